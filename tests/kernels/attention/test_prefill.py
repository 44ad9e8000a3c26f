"""Prefill attention matches the reference and float64, with NaN in all memory that it must not read."""

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import reference
from fastllama.kernels.attention.prefill import attention_prefill
from fastllama.kernels.batch import RaggedBatch, Segment
from tests.kernels.attention.cases import BF16, FP16, FP32, REJECTED, Case, build, decode_case, oracle
from tests.kernels.cases import NAMES
from tests.kernels.guards import GuardedMemory
from tests.support.tiers import parameters

CASE_LIST = [
    Case([(0, 0, 41)], 2, 4, 64, BF16),
    Case([(0, 0, 17), (1, 0, 5), (2, 0, 129)], 2, 3, 48, BF16),
    Case([(0, 0, 65)], 1, 1, 128, FP16),
    Case([(0, 0, 130)], 2, 1, 16, FP16),
    Case([(0, 0, 33), (1, 0, 20)], 1, 16, 8, FP16),
    Case([(0, 0, 35)], 1, 7, 256, BF16),
    Case([(0, 0, 37), (1, 0, 3)], 2, 4, 128, FP32),
    Case([(0, 0, 11)], 1, 3, 256, FP32),
    Case([(0, 0, 3), (1, 60, 2)], 1, 128, 16, FP32),
    Case([(0, 63, 64)], 2, 4, 64, FP16),  # a later chunk, starting one position before a tile of keys
    Case([(0, 256, 70), (1, 128, 1)], 1, 4, 64, BF16),
    Case([(0, 127, 129), (1, 129, 40)], 1, 3, 128, BF16),
    Case([(3, 150, 60), (1, 3, 1), (4, 0, 30), (0, 200, 1)], 2, 4, 64, BF16),  # rows out of order, and not all of them
    Case([(2, 99, 1), (0, 0, 1), (1, 63, 1)], 2, 4, 128, BF16),  # one token each, but row i is not token i
    Case([(1, 90, 4), (0, 77, 4)], 2, 4, 64, FP32),  # verification of speculated tokens
    Case([(0, 10, 2), (1, 190, 3)], 1, 2, 6, BF16),
]
CASES = {case.id: case for case in CASE_LIST}


@pytest.mark.parametrize("case", parameters(CASES, quick=list(CASES)[::2]))
def test_attention_prefill_matches_reference(case: Case, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(case, guarded, device)
    assert not tensors.batch.is_decode_step
    assert_matches("attention", attention_prefill(*tensors), reference.attention(*tensors))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
def test_attention_prefill_matches_float64(dtype: torch.dtype, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(Case([(1, 70, 20), (0, 0, 9)], 2, 3, 40, dtype), guarded, device)
    assert_matches("attention", attention_prefill(*tensors).cpu(), oracle(*tensors))


def test_attention_prefill_serves_a_decode_step(guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(decode_case([63, 1, 200], 2, 4, 64, BF16), guarded, device)
    assert_matches("attention", attention_prefill(*tensors), reference.attention(*tensors))


def test_attention_prefill_handles_large_scores(guarded: GuardedMemory, device: torch.device) -> None:
    """Scores far beyond the range of exp: the softmax subtracts the maximum."""
    tensors = build(Case([(0, 130, 20)], 1, 2, 32, FP32), guarded, device)
    tensors.q.mul_(100)
    assert_matches("attention", attention_prefill(*tensors).cpu(), oracle(*tensors))


def test_attention_prefill_needs_no_exact_lengths(guarded: GuardedMemory, device: torch.device) -> None:
    """The segments of a captured step hold only upper bounds of the lengths."""
    q, cache, batch = build(Case([(0, 40, 30), (1, 7, 1)], 2, 4, 64, BF16), guarded, device)
    bounds = tuple(segment._replace(keys=cache.length) for segment in batch.segments)
    loose = RaggedBatch(batch.tokens, batch.positions, batch.rows, bounds, exact=False)
    assert torch.equal(attention_prefill(q, cache, loose), attention_prefill(q, cache, batch))


def test_attention_prefill_repeats_bit_for_bit(guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(CASE_LIST[12], guarded, device)
    assert torch.equal(attention_prefill(*tensors), attention_prefill(*tensors))


def test_attention_prefill_accepts_zero_tokens(guarded: GuardedMemory, device: torch.device) -> None:
    _, cache, _ = build(CASE_LIST[0], guarded, device)
    q = guarded.empty(0, 8, 64, dtype=BF16, device=device)
    assert attention_prefill(q, cache, RaggedBatch.of([], device)).shape == (0, 512)


def test_query_blocks_start_with_the_most_keys(device: torch.device) -> None:
    batch = RaggedBatch.of([(2, 0, [0] * 5), (0, 9, [0]), (1, 0, [0] * 2)], device)
    blocks = batch.query_blocks(2)
    assert blocks.dtype == torch.int32 and blocks.device.type == device.type
    assert blocks.tolist() == [[5, 6, 0], [4, 5, 2], [2, 4, 2], [0, 2, 2], [6, 8, 1]]
    assert batch.query_blocks(2) is blocks and batch.query_blocks(3) is not blocks


@pytest.mark.parametrize("fault", REJECTED)
def test_attention_prefill_rejects(fault: str, guarded: GuardedMemory, device: torch.device) -> None:
    tensors = build(decode_case([9, 20], 2, 2, 16, FP32), guarded, device)
    spoil, message = REJECTED[fault]
    with pytest.raises(ValueError, match=message):
        attention_prefill(*spoil(tensors))


def test_attention_prefill_rejects_segments_of_another_batch(guarded: GuardedMemory, device: torch.device) -> None:
    q, cache, batch = build(Case([(0, 0, 4), (1, 0, 3)], 2, 2, 16, FP32), guarded, device)
    first, second = batch.segments
    spoiled = {
        "must be the 7 tokens of q, got 4": (first,),
        "must lie one after the other": (second, first),
        "in the cache's 2 rows": (first, Segment(2, 4, 7, 3)),
    }
    for message, segments in spoiled.items():
        with pytest.raises(ValueError, match=message):
            attention_prefill(q, cache, RaggedBatch(batch.tokens, batch.positions, batch.rows, segments))
