"""Shared by the tests of both projection kernels: weights of unusual widths, and the reference's results."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.batch import RaggedBatch, Segment
from fastllama.kernels.paged_cache import LayerCache
from fastllama.kernels.rope import CacheTarget
from tests.kernels.cases import random
from tests.kernels.guards import GuardedMemory
from tests.kernels.pages import empty_cache

EPS = 1e-5
LENGTH, N_ROWS = 128, 4  # of the cache


class Shape(NamedTuple):
    """A model's widths that affect projections."""

    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int


SHAPES = {
    "E64-H8-K4-D8-F172": Shape(64, 8, 4, 8, 172),  # stories260K: rows of 344 bytes
    "E192-H6-K2-D32-F480": Shape(192, 6, 2, 32, 480),  # the built-in model
    "E100-H3-K1-D20-F90": Shape(100, 3, 1, 20, 90),  # no width is a power of two
    "E512-H3-K1-D64-F768": Shape(512, 3, 1, 64, 768),  # widths are multiples of a chunk
}


class Case:
    """A projection's tensors. The caches are between guard bands and hold NaN."""

    def __init__(
        self,
        shape: Shape,
        n_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: GuardedMemory,
        *,
        with_biases: bool = False,
    ) -> None:
        self.shape, self.memory = shape, memory
        dim, n_heads, n_kv_heads, head_dim, hidden_dim = shape

        def weight(rows: int, width: int, seed: int) -> Tensor:
            """Random weights that keep products near unit variance, in guarded memory."""
            return memory.copy((random(rows, width, seed=seed) / width**0.5).to(dtype).to(device))

        self.batch = scattered(n_tokens, device)
        self.h = memory.copy(random(n_tokens, dim, dtype=dtype, seed=1).to(device))
        self.x = memory.copy(random(n_tokens, hidden_dim, dtype=dtype, seed=2).to(device))
        self.norm = memory.copy(random(dim, dtype=dtype, seed=3).to(device))
        self.wqkv = weight((n_heads + 2 * n_kv_heads) * head_dim, dim, seed=4)
        self.w13 = weight(2 * hidden_dim, dim, seed=5)
        self.w2 = weight(dim, hidden_dim, seed=6)
        self.bqkv, self.b13, self.b2 = (
            memory.copy(random(packed.shape[0], dtype=dtype, seed=8 + i).to(device)) if with_biases else None
            for i, packed in enumerate((self.wqkv, self.w13, self.w2))
        )
        angles = random(LENGTH, head_dim // 2, seed=7)
        rope = memory.copy(torch.stack([angles.cos(), angles.sin()], -1).to(device))
        self.cache = empty_cache(memory, N_ROWS, LENGTH, n_kv_heads, head_dim, dtype, device)
        self.target = CacheTarget.of(self.cache, rope, self.batch)

    def expected_qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, H·D) and the cache's pages of keys and values, with NaN where nothing is written."""
        k, v = (torch.full_like(pages, torch.nan) for pages in (self.cache.k, self.cache.v))
        cache = LayerCache(k, v, self.cache.table)
        packed = reference.pack(self.wqkv)
        q = reference.norm_qkv_rope_append(
            self.h, self.norm, packed, self.target.rope, cache, EPS, self.batch, self.bqkv
        )
        return q.flatten(1), k, v

    def expected_swiglu(self) -> Tensor:
        """(N, F)."""
        return reference.norm_swiglu(self.h, self.norm, reference.pack(self.w13), EPS, self.batch, self.b13)

    def expected_projection(self, residual: Tensor | None) -> Tensor:
        """(N, E)."""
        return reference.linear_residual(self.x, reference.pack(self.w2), residual, self.batch, self.b2)


def scattered(n_tokens: int, device: torch.device) -> RaggedBatch:
    """Tokens of up to three rows, which are not in order, at positions that differ by row, on two pages."""
    third = n_tokens // 3
    counts = {3: n_tokens - 2 * third, 0: third, 2: third}
    return RaggedBatch.of([(row, 5 * row + 50, [0] * count) for row, count in counts.items() if count], device)


def outside(n_tokens: int, device: torch.device) -> RaggedBatch:
    """Tokens of row 1 at positions before and after the cache."""
    positions = torch.tensor([-1, LENGTH, LENGTH + 5, -(2**40)] * n_tokens, device=device)[:n_tokens]
    rows = torch.ones_like(positions)
    return RaggedBatch(torch.zeros_like(positions), positions, rows, (Segment(1, 0, n_tokens, LENGTH),))


def assert_appended(ours: Tensor, expected: Tensor) -> None:
    """Assert that a cache that held NaN has new values exactly where the reference has written."""
    assert torch.equal(ours.isnan(), expected.isnan())
