"""Decode attention matches the reference and float64, with NaN in all memory that it must not read."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import reference
from fastllama.kernels.attention.decode import attention_decode
from fastllama.kernels.attention.online_softmax import DEFAULT_SHARED_BYTES, PAIR_BYTES, stream_launch
from fastllama.kernels.attention.scratch import NUM_SPLITS, AttentionScratch
from fastllama.kernels.batch import RaggedBatch
from tests.kernels.attention.cases import (
    BF16,
    FP16,
    FP32,
    REJECTED,
    Case,
    Tensors,
    build,
    decode_case,
    oracle,
    scratch_for,
)
from tests.kernels.cases import NAMES, random
from tests.kernels.guards import GuardedMemory
from tests.support.tiers import parameters

CASE_LIST = [
    decode_case([1], 2, 4, 64, BF16),
    decode_case([63, 64, 65], 2, 4, 64, BF16),
    decode_case([127, 128, 129, 1, 2], 1, 7, 48, BF16),
    decode_case([1, 700, 33], 2, 4, 64, FP16),
    decode_case([1000], 1, 3, 128, FP32),
    decode_case([1030], 2, 4, 128, BF16),
    decode_case([300, 1, 300], 1, 16, 256, BF16),
    decode_case([260, 131], 1, 4, 256, FP32),
    decode_case([200, 200, 200, 200], 2, 1, 16, FP16),
    decode_case([517, 3], 1, 20, 8, FP32),
    decode_case([40, 260], 1, 128, 16, FP32),
    decode_case([141, 9], 1, 2, 6, BF16),
    decode_case([1 + 37 * row % 301 for row in range(40)], 1, 4, 16, FP32),
    decode_case([5000] + [1] * 39, 1, 2, 8, BF16),
]
CASES = {case.id: case for case in CASE_LIST}


def run(tensors: Tensors, scratch: AttentionScratch | None = None) -> Tensor:
    """Attention of a decode step. Asserts that the scratch's counters are zero afterwards."""
    q, cache, batch = tensors
    scratch = scratch or scratch_for(tensors)
    out = attention_decode(q, cache, batch.positions, scratch)
    assert not scratch.counters.any()
    return out


@pytest.mark.parametrize("case", parameters(CASES, quick=list(CASES)[::2]))
def test_attention_decode_matches_reference(case: Case, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(case, guarded, device)
    assert tensors.batch.is_decode_step
    assert_matches("attention", run(tensors), reference.attention(*tensors))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
def test_attention_decode_matches_float64(dtype: torch.dtype, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(decode_case([300, 1, 77], 2, 3, 40, dtype), guarded, device)
    assert_matches("attention", run(tensors).cpu(), oracle(*tensors))


def test_attention_decode_handles_large_scores(guarded: GuardedMemory, device: torch.device) -> None:
    """Scores far beyond the range of exp: the softmax subtracts the maximum, also between splits."""
    tensors = build(decode_case([500, 3], 1, 2, 32, FP32), guarded, device)
    tensors.q.mul_(100)
    assert_matches("attention", run(tensors).cpu(), oracle(*tensors))


@pytest.mark.parametrize("case", [CASE_LIST[3], CASE_LIST[5]], ids=lambda case: case.id)
def test_attention_decode_repeats_bit_for_bit(case: Case, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(case, guarded, device)
    assert torch.equal(run(tensors), run(tensors))


def test_attention_decode_is_the_same_with_scratch_for_more_rows(guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(CASE_LIST[3], guarded, device)
    assert torch.equal(run(tensors), run(tensors, scratch_for(tensors, max_rows=17)))


def test_attention_decode_reuses_its_scratch(guarded: GuardedMemory, device: torch.device) -> None:
    """One scratch serves batches of any size: values that earlier calls left in it have no effect."""
    cases = [
        decode_case([900, 20, 1, 400], 1, 3, 16, FP32),
        decode_case([257], 1, 3, 16, FP32),
        decode_case([1, 640], 1, 3, 16, FP32),
    ]
    scratch = AttentionScratch.of(4, 1, 3, 16, device)
    for case in cases:
        tensors = build(case, guarded, device)
        assert_matches("attention", run(tensors, scratch), reference.attention(*tensors))


def test_attention_decode_recovers_from_a_broken_call(guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(decode_case([900, 20], 2, 2, 16, FP32), guarded, device)
    scratch = scratch_for(tensors)
    scratch.counters.add_(3)
    scratch.reset()
    assert_matches("attention", run(tensors, scratch), reference.attention(*tensors))


@pytest.mark.parametrize("seed", range(4))
def test_attention_decode_splits_any_lengths(seed: int, guarded: GuardedMemory, device: torch.device) -> None:
    """Lengths of all magnitudes: every position of every row belongs to exactly one split."""
    generator = torch.Generator().manual_seed(seed)
    count = [2, 5, 11, 35][seed]
    lengths = (2 ** (torch.rand(count, generator=generator) * 11)).long().tolist()
    tensors = build(decode_case(lengths, 1, 2, 8, FP32), guarded, device)
    assert_matches("attention", run(tensors), reference.attention(*tensors))


def test_attention_decode_stays_inside_the_cache(guarded: GuardedMemory, device: torch.device) -> None:
    """A position outside the cache reads up to the nearest position inside."""
    q, cache, batch = build(decode_case([200, 90, 1], 2, 2, 16, FP32), guarded, device)
    cache.k.copy_(random(*cache.k.shape, seed=1))
    cache.v.copy_(random(*cache.v.shape, seed=2))
    scratch = scratch_for(Tensors(q, cache, batch))
    last = cache.length - 1
    outside, nearest = (
        attention_decode(q, cache, torch.tensor(positions, device=device), scratch)
        for positions in ([last + 1, 2**40, -3], [last, last, 0])
    )
    assert torch.equal(outside, nearest)


def test_attention_decode_accepts_zero_tokens(guarded: GuardedMemory, device: torch.device) -> None:
    _, cache, _ = build(CASE_LIST[0], guarded, device)
    q = guarded.empty(0, 8, 64, dtype=BF16, device=device)
    positions = RaggedBatch.of([], device).positions
    assert attention_decode(q, cache, positions, AttentionScratch.of(1, 2, 8, 64, device)).shape == (0, 512)


def test_attention_scratch_grows_with_the_rows_only() -> None:
    scratch = AttentionScratch.of(5, 2, 6, 10, torch.device("cpu"))
    held = (scratch.acc, scratch.score_max, scratch.p_sum)
    assert sum(tensor.numel() for tensor in held) == (NUM_SPLITS + 5) * 2 * 3 * (10 + 2)
    several = AttentionScratch.of(5, 2, 6, 10, torch.device("cpu"), max_tokens_per_row=16, max_tokens=16)
    assert several.p_sum.numel() == (NUM_SPLITS + 1) * 16 * 6 and several.counters.numel() == 16 * 6
    assert scratch.num_splits == NUM_SPLITS
    assert AttentionScratch.of(5, 2, 6, 10, torch.device("cpu"), num_splits=8).num_splits == 8


@pytest.mark.parametrize("fault", REJECTED)
def test_attention_decode_rejects(fault: str, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(decode_case([9, 20], 2, 2, 16, FP32), guarded, device)
    spoil, message = REJECTED[fault]
    scratch = scratch_for(tensors)
    q, cache, batch = spoil(tensors)
    with pytest.raises(ValueError, match=message):
        attention_decode(q, cache, batch.positions, scratch)


def test_attention_decode_rejects_positions_cache_and_scratch(guarded: GuardedMemory, device: torch.device) -> None:
    q, cache, batch = tensors = build(decode_case([9, 20], 2, 2, 16, FP32), guarded, device)
    scratch, positions = scratch_for(tensors), batch.positions
    with pytest.raises(ValueError, match=r"positions must be torch.int64, got torch.int32"):
        attention_decode(q, cache, positions.int(), scratch)
    with pytest.raises(ValueError, match=r"positions must have shape \(2\), got \(1\)"):
        attention_decode(q, cache, positions[:1], scratch)
    with pytest.raises(ValueError, match="the cache must have a row for each of the 2 tokens, got 1"):
        attention_decode(q, cache._replace(table=cache.table[:1]), positions, scratch)
    with pytest.raises(ValueError, match="scratch must be for at least 2 rows of 1 tokens .* got one for 1 rows"):
        attention_decode(q, cache, positions, scratch_for(tensors, max_rows=1))
    with pytest.raises(ValueError, match=r"\(K, G, D\) = \(2, 2, 16\), got one for 2 rows of .* and \(2, 1, 16\)"):
        attention_decode(q, cache, positions, AttentionScratch.of(2, 2, 2, 16, device))
    with pytest.raises(ValueError, match="scratch must be on .*, got meta"):
        attention_decode(q, cache, positions, replace(scratch, acc=scratch.acc.to("meta")))


@pytest.mark.parametrize(("head_dim", "itemsize"), [(64, 2), (128, 2), (256, 2), (64, 4), (128, 4)])
def test_stream_launch_fits_default_shared_memory(head_dim: int, itemsize: int) -> None:
    """The tiles in flight and 16 queries fit together. pairs=2 keeps twice as many bytes in flight."""
    launch = stream_launch(16, head_dim * itemsize, itemsize)
    pair = 2 * launch.keys * head_dim * itemsize
    queries = 16 * (head_dim * itemsize + launch.keys * itemsize)
    assert launch.stages >= 2 and (launch.stages - 1) * pair + queries <= DEFAULT_SHARED_BYTES
    assert (launch.stages - 1) * pair <= PAIR_BYTES or launch.stages == 2
    assert stream_launch(16, head_dim * itemsize, itemsize, pairs=2).stages > launch.stages


def test_stream_launch_keeps_its_stages() -> None:
    assert [stream_launch(16, 2 * head_dim, 2).stages for head_dim in (64, 128)] == [3, 2]
    assert [stream_launch(16, 2 * head_dim, 2, pairs=2).stages for head_dim in (64, 128)] == [5, 3]
