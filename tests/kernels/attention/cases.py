"""Shared by the tests of both attention kernels: cases, tensors with NaN outside the rows, and an oracle."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.kernels.attention.scratch import AttentionScratch
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache
from tests.kernels.cases import NAMES, random
from tests.kernels.guards import GuardedMemory
from tests.kernels.pages import dense, shuffled_table, write_row

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LAYERS, LAYER = 3, 1  # the cache is a view of one layer, between two that hold NaN
SPARE_POSITIONS = 5  # of the cache, beyond its longest row


class Case(NamedTuple):
    """A batch and its numbers of heads."""

    pieces: list[tuple[int, int, int]]  # (cache row, position of the first token, tokens)
    n_kv_heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        rows = max(row for row, _, _ in self.pieces) + 1
        tokens = sum(count for _, _, count in self.pieces)
        longest = max(start + count for _, start, count in self.pieces)
        heads = f"H{self.n_kv_heads * self.groups}-K{self.n_kv_heads}-D{self.head_dim}"
        return f"B{rows}-N{tokens}-T{longest}-{heads}-{NAMES[self.dtype]}"


def decode_case(lengths: list[int], n_kv_heads: int, groups: int, head_dim: int, dtype: torch.dtype) -> Case:
    """One token per row, at the last position of rows of these lengths."""
    return Case([(row, length - 1, 1) for row, length in enumerate(lengths)], n_kv_heads, groups, head_dim, dtype)


class Tensors(NamedTuple):
    """The arguments of an attention kernel."""

    q: Tensor
    cache: LayerCache
    batch: RaggedBatch


def build(case: Case, memory: GuardedMemory, device: torch.device) -> Tensors:
    """Random tensors. The cache holds NaN (keys) and infinity (values) outside the batch's rows."""
    batch = RaggedBatch.of([(row, start, [0] * count) for row, start, count in case.pieces], device)
    n_rows, longest = max(s.row for s in batch.segments) + 1, max(s.keys for s in batch.segments)
    table = memory.copy(shuffled_table(n_rows, longest + SPARE_POSITIONS, device))
    shape = (LAYERS, table.numel() + 1, case.n_kv_heads, PAGE_TOKENS, case.head_dim)
    k, v = (memory.empty(*shape, dtype=case.dtype, device=device) for _ in range(2))
    v[LAYER] = torch.inf
    cache = LayerCache(k[LAYER], v[LAYER], table)
    for segment in batch.segments:
        shape_of_row = (case.n_kv_heads, segment.keys, case.head_dim)
        keys, values = (random(*shape_of_row, dtype=case.dtype, seed=7 * segment.row + seed) for seed in range(2))
        write_row(cache, segment.row, keys, values)
    n_heads = case.n_kv_heads * case.groups
    q = memory.copy(random(len(batch.tokens), n_heads, case.head_dim, dtype=case.dtype, seed=9, device=device))
    return Tensors(q, cache, batch)


def scratch_for(tensors: Tensors, max_rows: int | None = None) -> AttentionScratch:
    """Scratch memory for the tensors' rows, or for max_rows."""
    rows, n_heads, head_dim = tensors.q.shape
    return AttentionScratch.of(max_rows or rows, tensors.cache.k.shape[1], n_heads, head_dim, tensors.q.device)


def oracle(q: Tensor, cache: LayerCache, batch: RaggedBatch) -> Tensor:
    """Attention by its definition, token by token, in float64."""
    groups = q.shape[1] // cache.k.shape[1]
    k, v = dense(cache)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for token, (row, position) in enumerate(zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)):
        for head in range(q.shape[1]):
            keys, values = (one[row, head // groups, : position + 1].cpu().double() for one in (k, v))
            scores = keys @ q[token, head].cpu().double() / math.sqrt(q.shape[2])
            out[token, head] = torch.softmax(scores, 0) @ values
    return out.flatten(1)


def with_head_dim(tensors: Tensors, head_dim: int) -> Tensors:
    cache = tensors.cache
    q, k, v = (tensor.new_zeros(*tensor.shape[:-1], head_dim) for tensor in (tensors.q, cache.k, cache.v))
    return Tensors(q, LayerCache(k, v, cache.table), tensors.batch)


def with_cache(tensors: Tensors, **changed: Tensor) -> Tensors:
    """The tensors with other k, v or table."""
    return tensors._replace(cache=tensors.cache._replace(**changed))


# A function that makes valid tensors invalid, and the error message.
REJECTED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "q of two dims": (lambda t: t._replace(q=t.q[0]), r"q must have shape \(N, H, D\)"),
    "float64": (lambda t: t._replace(q=t.q.double()), "q must be float32, bfloat16 or float16, got torch.float64"),
    "mixed dtypes": (lambda t: with_cache(t, v=t.cache.v.half()), "cache.v must be torch.float32"),
    "another head dim": (lambda t: t._replace(q=t.q[..., :8].contiguous()), r"cache.k must have shape \(P, K, 64, 8\)"),
    "caches that differ": (lambda t: with_cache(t, v=t.cache.v[1:].contiguous()), "cache.v must have shape"),
    "strided q": (lambda t: t._replace(q=t.q[:, ::2]), "q must be contiguous"),
    "strided cache": (lambda t: with_cache(t, k=t.cache.k.mT.contiguous().mT), "cache.k must be contiguous"),
    "H no multiple of K": (lambda t: t._replace(q=t.q[:, :3].contiguous()), "H must be a multiple of the cache's 2"),
    "no heads": (lambda t: t._replace(q=t.q[:, :0].contiguous()), "H must be a multiple"),
    "odd head dim": (lambda t: with_head_dim(t, 15), "even head dims up to 256, got 15"),
    "long head dim": (lambda t: with_head_dim(t, 258), "even head dims up to 256, got 258"),
    "another device": (lambda t: with_cache(t, k=t.cache.k.to("meta")), "cache.k must be on .*, got meta"),
    "pages of 32": (lambda t: with_cache(t, k=t.cache.k[:, :, :32].contiguous()), "cache.k must have shape"),
    "a table of int64": (lambda t: with_cache(t, table=t.cache.table.long()), "cache.table must be torch.int32"),
    "a strided table": (lambda t: with_cache(t, table=t.cache.table.repeat(1, 2)[:, ::2]), "cache.table must be"),
}
