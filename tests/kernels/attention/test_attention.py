"""The attention kernels against the plain-torch twin, with everything poisoned that they must not read."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import reference
from fastllama.kernels.attention.decode import attention_decode
from fastllama.kernels.attention.prefill import attention_prefill
from fastllama.kernels.attention.scratch import SPLITS, AttentionScratch
from fastllama.kernels.attention.tile import PAIR_BYTES, PLAIN_SHARED_BYTES, stream_launch
from fastllama.kernels.batch import RaggedBatch, Segment
from tests.kernels.cases import NAMES, random
from tests.kernels.guards import GuardedMemory
from tests.support.tiers import parameters

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LAYERS, LAYER = 3, 1  # the cache is a view of one layer, between two that hold NaN
ROOM = 5  # positions that the cache has beyond its longest row


class Case(NamedTuple):
    """A batch and its heads."""

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


def decode(lengths: list[int], n_kv_heads: int, groups: int, head_dim: int, dtype: torch.dtype) -> Case:
    return Case([(row, length - 1, 1) for row, length in enumerate(lengths)], n_kv_heads, groups, head_dim, dtype)


DECODE = [
    decode([1], 2, 4, 64, BF16),
    decode([63, 64, 65], 2, 4, 64, BF16),
    decode([127, 128, 129, 1, 2], 1, 7, 48, BF16),
    decode([1, 700, 33], 2, 4, 64, FP16),
    decode([1000], 1, 3, 128, FP32),
    decode([1030], 2, 4, 128, BF16),
    decode([300, 1, 300], 1, 16, 256, BF16),
    decode([260, 131], 1, 4, 256, FP32),
    decode([200, 200, 200, 200], 2, 1, 16, FP16),
    decode([517, 3], 1, 20, 8, FP32),
    decode([40, 260], 1, 128, 16, FP32),
    decode([141, 9], 1, 2, 6, BF16),
    decode([1 + 37 * row % 301 for row in range(40)], 1, 4, 16, FP32),
    decode([5000] + [1] * 39, 1, 2, 8, BF16),
]
PREFILL = [
    Case([(0, 0, 41)], 2, 4, 64, BF16),
    Case([(0, 0, 17), (1, 0, 5), (2, 0, 129)], 2, 3, 48, BF16),
    Case([(0, 0, 65)], 1, 1, 128, FP16),
    Case([(0, 0, 130)], 2, 1, 16, FP16),
    Case([(0, 0, 33), (1, 0, 20)], 1, 16, 8, FP16),
    Case([(0, 0, 35)], 1, 7, 256, BF16),
    Case([(0, 0, 37), (1, 0, 3)], 2, 4, 128, FP32),
    Case([(0, 0, 11)], 1, 3, 256, FP32),
    Case([(0, 0, 3), (1, 60, 2)], 1, 128, 16, FP32),
    Case([(0, 63, 64)], 2, 4, 64, FP16),  # a later chunk, from one position below a tile of keys
    Case([(0, 256, 70), (1, 128, 1)], 1, 4, 64, BF16),
    Case([(0, 127, 129), (1, 129, 40)], 1, 3, 128, BF16),
    Case([(3, 150, 60), (1, 3, 1), (4, 0, 30), (0, 200, 1)], 2, 4, 64, BF16),  # rows out of order, and not all
    Case([(2, 99, 1), (0, 0, 1), (1, 63, 1)], 2, 4, 128, BF16),  # one token each, but row i is not token i
    Case([(1, 90, 4), (0, 77, 4)], 2, 4, 64, FP32),  # speculated tokens to verify
    Case([(0, 10, 2), (1, 190, 3)], 1, 2, 6, BF16),
]
CASES = {case.id: case for case in (*DECODE, *PREFILL)}
BOTH = pytest.mark.parametrize("case", parameters(CASES, quick=list(CASES)[::2]))


class Tensors(NamedTuple):
    """What a case calls its kernel with."""

    q: Tensor
    cache_k: Tensor
    cache_v: Tensor
    batch: RaggedBatch


def build(case: Case, memory: GuardedMemory, device: torch.device) -> Tensors:
    """Random tensors. The cache holds NaN and infinity where the batch's rows have no position."""
    batch = RaggedBatch.of([(row, start, [0] * count) for row, start, count in case.pieces], device)
    n_rows, longest = max(s.row for s in batch.segments) + 1, max(s.keys for s in batch.segments)
    shape = (LAYERS, n_rows, case.n_kv_heads, longest + ROOM, case.head_dim)
    caches = [memory.empty(*shape, dtype=case.dtype, device=device) for _ in range(2)]
    for seed, cache in enumerate(caches):
        cache[LAYER] = torch.inf if seed else torch.nan
        for segment in batch.segments:
            values = random(case.n_kv_heads, segment.keys, case.head_dim, dtype=case.dtype, seed=7 * segment.row + seed)
            cache[LAYER, segment.row, :, : segment.keys] = values.to(device)
    n_heads = case.n_kv_heads * case.groups
    q = memory.copy(random(len(batch.tokens), n_heads, case.head_dim, dtype=case.dtype, seed=9, device=device))
    return Tensors(q, caches[0][LAYER], caches[1][LAYER], batch)


def scratch_for(tensors: Tensors, max_rows: int | None = None) -> AttentionScratch:
    rows, n_heads, head_dim = tensors.q.shape
    return AttentionScratch.of(max_rows or rows, tensors.cache_k.shape[1], n_heads, head_dim, tensors.q.device)


def run(tensors: Tensors, scratch: AttentionScratch | None = None) -> Tensor:
    """The kernel that the backend would choose."""
    q, cache_k, cache_v, batch = tensors
    if not batch.is_decode_step:
        return attention_prefill(q, cache_k, cache_v, batch)
    scratch = scratch or scratch_for(tensors)
    out = attention_decode(q, cache_k, cache_v, batch.positions, scratch)
    assert not scratch.counters.any()
    return out


def oracle(q: Tensor, cache_k: Tensor, cache_v: Tensor, batch: RaggedBatch) -> Tensor:
    """Attention from its definition, token by token, in float64."""
    groups = q.shape[1] // cache_k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for token, (row, position) in enumerate(zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)):
        for head in range(q.shape[1]):
            keys, values = (cache[row, head // groups, : position + 1].cpu().double() for cache in (cache_k, cache_v))
            scores = keys @ q[token, head].cpu().double() / math.sqrt(q.shape[2])
            out[token, head] = torch.softmax(scores, 0) @ values
    return out.flatten(1)


@BOTH
def test_attention_matches_reference(case: Case, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(case, guarded, device)
    assert tensors.batch.is_decode_step == (case in DECODE)
    assert_matches("attention", run(tensors), reference.attention(*tensors))


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
def test_attention_matches_the_definition(
    kernel: str, dtype: torch.dtype, guarded: GuardedMemory, device: torch.device
) -> None:
    if kernel == "decode":
        case = decode([300, 1, 77], 2, 3, 40, dtype)
    else:
        case = Case([(1, 70, 20), (0, 0, 9)], 2, 3, 40, dtype)
    tensors = build(case, guarded, device)
    assert_matches("attention", run(tensors).cpu(), oracle(*tensors))


def test_attention_prefill_serves_a_decode_step(guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(decode([63, 1, 200], 2, 4, 64, BF16), guarded, device)
    assert_matches("attention", attention_prefill(*tensors), reference.attention(*tensors))


def test_attention_holds_large_scores(guarded: GuardedMemory, device: torch.device) -> None:
    """Scores far beyond what exp can hold: the softmax subtracts the maximum, also between pieces."""
    for case in (decode([500, 3], 1, 2, 32, FP32), Case([(0, 130, 20)], 1, 2, 32, FP32)):
        q, cache_k, cache_v, batch = build(case, guarded, device)
        q *= 100
        assert_matches("attention", run(Tensors(q, cache_k, cache_v, batch)).cpu(), oracle(q, cache_k, cache_v, batch))


def test_attention_prefill_needs_no_exact_lengths(guarded: GuardedMemory, device: torch.device) -> None:
    """A captured step knows only a bound of its rows' lengths."""
    q, cache_k, cache_v, batch = build(Case([(0, 40, 30), (1, 7, 1)], 2, 4, 64, BF16), guarded, device)
    bounds = tuple(segment._replace(keys=cache_k.shape[2]) for segment in batch.segments)
    loose = RaggedBatch(batch.tokens, batch.positions, batch.rows, bounds, exact=False)
    assert torch.equal(attention_prefill(q, cache_k, cache_v, loose), attention_prefill(q, cache_k, cache_v, batch))


@pytest.mark.parametrize("case", [DECODE[3], DECODE[5], PREFILL[12]], ids=lambda case: case.id)
def test_attention_repeats_bit_for_bit(case: Case, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(case, guarded, device)
    assert torch.equal(run(tensors), run(tensors))


def test_attention_decode_row_is_the_same_in_longer_scratch(guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(DECODE[3], guarded, device)
    assert torch.equal(run(tensors), run(tensors, scratch_for(tensors, max_rows=17)))


def test_attention_decode_reuses_its_scratch(guarded: GuardedMemory, device: torch.device) -> None:
    """One scratch for batches of any size: what an earlier call left there has no influence."""
    cases = [decode([900, 20, 1, 400], 1, 3, 16, FP32), decode([257], 1, 3, 16, FP32), decode([1, 640], 1, 3, 16, FP32)]
    scratch = AttentionScratch.of(4, 1, 3, 16, device)
    for case in cases:
        tensors = build(case, guarded, device)
        assert_matches("attention", run(tensors, scratch), reference.attention(*tensors))


def test_attention_decode_recovers_from_a_broken_call(guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(decode([900, 20], 2, 2, 16, FP32), guarded, device)
    scratch = scratch_for(tensors)
    scratch.counters.add_(3)
    scratch.reset()
    assert_matches("attention", run(tensors, scratch), reference.attention(*tensors))


@pytest.mark.parametrize("seed", range(4))
def test_attention_decode_deals_any_lengths(seed: int, guarded: GuardedMemory, device: torch.device) -> None:
    """Lengths of all magnitudes: every position of every row is some slot's, once."""
    generator = torch.Generator().manual_seed(seed)
    count = [2, 5, 11, 35][seed]
    lengths = (2 ** (torch.rand(count, generator=generator) * 11)).long().tolist()
    tensors = build(decode(lengths, 1, 2, 8, FP32), guarded, device)
    assert_matches("attention", run(tensors), reference.attention(*tensors))


def test_attention_decode_stays_inside_the_cache(guarded: GuardedMemory, device: torch.device) -> None:
    """A position that the cache does not have reads the nearest that it has."""
    q, cache_k, cache_v, batch = build(decode([200, 90, 1], 2, 2, 16, FP32), guarded, device)
    cache_k.copy_(random(*cache_k.shape, seed=1))
    cache_v.copy_(random(*cache_v.shape, seed=2))
    scratch = scratch_for(Tensors(q, cache_k, cache_v, batch))
    last = cache_k.shape[2] - 1
    outside, nearest = (
        attention_decode(q, cache_k, cache_v, torch.tensor(positions, device=device), scratch)
        for positions in ([last + 1, 2**40, -3], [last, last, 0])
    )
    assert torch.equal(outside, nearest)


def test_attention_takes_no_tokens(guarded: GuardedMemory, device: torch.device) -> None:
    _, cache_k, cache_v, _ = build(DECODE[0], guarded, device)
    q = guarded.empty(0, 8, 64, dtype=BF16, device=device)
    empty = RaggedBatch.of([], device)
    assert attention_prefill(q, cache_k, cache_v, empty).shape == (0, 512)
    scratch = AttentionScratch.of(1, 2, 8, 64, device)
    assert attention_decode(q, cache_k, cache_v, empty.positions, scratch).shape == (0, 512)


def test_query_blocks_start_with_the_most_keys(device: torch.device) -> None:
    batch = RaggedBatch.of([(2, 0, [0] * 5), (0, 9, [0]), (1, 0, [0] * 2)], device)
    blocks = batch.query_blocks(2)
    assert blocks.dtype == torch.int32 and blocks.device.type == device.type
    assert blocks.tolist() == [[5, 6, 0], [4, 5, 2], [2, 4, 2], [0, 2, 2], [6, 8, 1]]
    assert batch.query_blocks(2) is blocks and batch.query_blocks(3) is not blocks


def test_attention_scratch_grows_with_the_rows_only() -> None:
    scratch = AttentionScratch.of(5, 2, 6, 10, torch.device("cpu"))
    held = (scratch.mixed, scratch.maxima, scratch.totals)
    assert sum(tensor.numel() for tensor in held) == (SPLITS + 5) * 2 * 3 * (10 + 2)
    assert scratch.slots == SPLITS
    assert AttentionScratch.of(5, 2, 6, 10, torch.device("cpu"), slots=8).slots == 8


def with_head_dim(tensors: Tensors, head_dim: int) -> Tensors:
    q, k, v = (
        tensor.new_zeros(*tensor.shape[:-1], head_dim) for tensor in (tensors.q, tensors.cache_k, tensors.cache_v)
    )
    return Tensors(q, k, v, tensors.batch)


REJECTED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "q of two dims": (lambda t: t._replace(q=t.q[0]), r"q must have shape \(N, H, D\)"),
    "float64": (lambda t: t._replace(q=t.q.double()), "q must be float32, bfloat16 or float16, got torch.float64"),
    "mixed dtypes": (lambda t: t._replace(cache_v=t.cache_v.half()), "cache_v must be torch.float32"),
    "another head dim": (lambda t: t._replace(q=t.q[..., :8].contiguous()), r"cache_k must have shape \(B, K, T, 8\)"),
    "caches that differ": (lambda t: t._replace(cache_v=t.cache_v[:, :, :9].contiguous()), "cache_v must have shape"),
    "strided q": (lambda t: t._replace(q=t.q[:, ::2]), "q must be contiguous"),
    "strided cache": (lambda t: t._replace(cache_k=t.cache_k[:, :, ::2]), "cache_k must be contiguous"),
    "H no multiple of K": (lambda t: t._replace(q=t.q[:, :3].contiguous()), "H must be a multiple of the cache's 2"),
    "no heads": (lambda t: t._replace(q=t.q[:, :0].contiguous()), "H must be a multiple"),
    "odd head dim": (lambda t: with_head_dim(t, 15), "even head dims up to 256, got 15"),
    "long head dim": (lambda t: with_head_dim(t, 258), "even head dims up to 256, got 258"),
    "another device": (lambda t: t._replace(cache_k=t.cache_k.to("meta")), "cache_k must be on .*, got meta"),
}


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
@pytest.mark.parametrize("how", REJECTED)
def test_attention_rejects(kernel: str, how: str, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(decode([9, 20], 2, 2, 16, FP32), guarded, device)
    spoil, message = REJECTED[how]
    scratch = scratch_for(tensors)
    q, cache_k, cache_v, batch = spoil(tensors)
    with pytest.raises(ValueError, match=message):
        if kernel == "decode":
            attention_decode(q, cache_k, cache_v, batch.positions, scratch)
        else:
            attention_prefill(q, cache_k, cache_v, batch)


def test_attention_decode_rejects_what_it_alone_takes(guarded: GuardedMemory, device: torch.device) -> None:
    q, cache_k, cache_v, batch = tensors = build(decode([9, 20], 2, 2, 16, FP32), guarded, device)
    scratch, positions = scratch_for(tensors), batch.positions
    with pytest.raises(ValueError, match=r"positions must be torch.int64, got torch.int32"):
        attention_decode(q, cache_k, cache_v, positions.int(), scratch)
    with pytest.raises(ValueError, match=r"positions must have shape \(2\), got \(1\)"):
        attention_decode(q, cache_k, cache_v, positions[:1], scratch)
    with pytest.raises(ValueError, match="the cache must have a row for each of the 2 tokens, got 1"):
        attention_decode(q, cache_k[:1], cache_v[:1], positions, scratch)
    with pytest.raises(ValueError, match="scratch must be for at least 2 rows .* got one for 1 rows"):
        attention_decode(q, cache_k, cache_v, positions, scratch_for(tensors, max_rows=1))
    with pytest.raises(ValueError, match=r"\(K, G, D\) = \(2, 2, 16\), got one for 2 rows and \(2, 1, 16\)"):
        attention_decode(q, cache_k, cache_v, positions, AttentionScratch.of(2, 2, 2, 16, device))
    with pytest.raises(ValueError, match="scratch must be on .*, got meta"):
        attention_decode(q, cache_k, cache_v, positions, replace(scratch, mixed=scratch.mixed.to("meta")))


def test_attention_prefill_rejects_segments_of_another_batch(guarded: GuardedMemory, device: torch.device) -> None:
    q, cache_k, cache_v, batch = build(Case([(0, 0, 4), (1, 0, 3)], 2, 2, 16, FP32), guarded, device)
    first, second = batch.segments
    spoiled = {
        "must be the 7 tokens of q, got 4": (first,),
        "must lie one after the other": (second, first),
        "in the cache's 2 rows": (first, Segment(2, 4, 7, 3)),
    }
    for message, segments in spoiled.items():
        with pytest.raises(ValueError, match=message):
            attention_prefill(q, cache_k, cache_v, RaggedBatch(batch.tokens, batch.positions, batch.rows, segments))


@pytest.mark.parametrize(("head_dim", "itemsize"), [(64, 2), (128, 2), (256, 2), (64, 4), (128, 4)])
def test_tiles_of_a_stream_keep_to_plain_shared_memory(head_dim: int, itemsize: int) -> None:
    """16 queries do, of as large a tile of keys as there is; twice as much is on its way where that is asked for."""
    launch = stream_launch(16, head_dim * itemsize, itemsize)
    pair = 2 * launch.keys * head_dim * itemsize
    queries = 16 * (head_dim * itemsize + launch.keys * itemsize)
    assert launch.stages >= 2 and (launch.stages - 1) * pair + queries <= PLAIN_SHARED_BYTES
    assert (launch.stages - 1) * pair <= PAIR_BYTES or launch.stages == 2
    assert stream_launch(16, head_dim * itemsize, itemsize, pairs=2).stages > launch.stages


def test_stages_are_those_of_the_tables() -> None:
    assert [stream_launch(16, 2 * head_dim, 2).stages for head_dim in (64, 128)] == [3, 2]
    assert [stream_launch(16, 2 * head_dim, 2, pairs=2).stages for head_dim in (64, 128)] == [5, 3]
