"""Decode attention of several tokens per row matches the reference, with NaN in all memory that it must not read."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import fused, reference
from fastllama.kernels.attention.decode import attention_decode
from fastllama.kernels.attention.online_softmax import AttentionDims
from fastllama.kernels.attention.scratch import AttentionScratch
from fastllama.kernels.decode_state import INACTIVE
from fastllama.kernels.paged_cache import LayerCache
from tests.kernels.attention.cases import BF16, FP16, FP32, Case, Tensors, build
from tests.kernels.guards import GuardedMemory
from tests.support.tiers import parameters


def case_of(
    lengths: list[int], size: int, n_kv_heads: int, groups: int, head_dim: int, dtype: torch.dtype
) -> tuple[int, Case]:
    """S tokens per row, the last at the last position of rows of these lengths -> (S, case)."""
    pieces = [(row, length - size, size) for row, length in enumerate(lengths)]
    return size, Case(pieces, n_kv_heads, groups, head_dim, dtype)


CASE_LIST = [
    case_of([2], 2, 2, 4, 64, BF16),
    case_of([65, 130, 64], 2, 2, 4, 64, BF16),
    case_of([300, 5], 5, 2, 4, 128, BF16),
    case_of([129, 1000], 5, 1, 3, 128, FP32),  # a split lies after all that the first tokens attend to
    case_of([137], 16, 1, 4, 64, BF16),
    case_of([700, 16, 131], 16, 1, 1, 32, FP16),
    case_of([260, 132], 5, 1, 8, 64, FP32),  # 40 queries in three tiles
    case_of([259], 16, 2, 8, 16, BF16),  # 128 queries in two tiles
    case_of([141, 9], 3, 1, 7, 6, FP32),  # 21 queries in two tiles, of which the second has fewer
    case_of([130 + 11 * row for row in range(35)], 2, 1, 2, 8, FP32),
    case_of([640, 6], 6, 1, 128, 16, BF16),
]
CASES = {f"S{size}-{case.id}": (size, case) for size, case in CASE_LIST}


def several(tensors: Tensors, size: int) -> Tensors:
    """The tensors as a decode step of S tokens per row."""
    return tensors._replace(batch=replace(tensors.batch, tokens_per_row=size, exact=False))


def run(tensors: Tensors, size: int, scratch: AttentionScratch | None = None) -> Tensor:
    """Attention of a decode step. Asserts that the scratch's counters are zero afterwards."""
    q, cache, batch = tensors
    if scratch is None:
        n_heads, head_dim = q.shape[1:]
        sizes = q.shape[0] // size, cache.k.shape[1], n_heads, head_dim
        scratch = AttentionScratch.of(*sizes, q.device, max_tokens_per_row=size)
    out = attention_decode(q, cache, batch.positions, scratch, tokens_per_row=size)
    assert not scratch.counters.any()
    return out


@pytest.mark.parametrize("sized", parameters(CASES, quick=list(CASES)[::4]))
def test_several_tokens_match_reference(sized: tuple[int, Case], guarded: GuardedMemory, device: torch.device) -> None:
    size, case = sized
    tensors = several(build(case, guarded, device), size)
    assert tensors.batch.is_decode_step
    out = run(tensors, size)
    assert_matches("attention", out, reference.attention(*tensors))
    assert torch.equal(out, run(tensors, size)), "repeats bit for bit"
    assert torch.equal(out, fused.attention(*tensors))


@pytest.mark.parametrize("seed", parameters({str(seed): seed for seed in range(3)}, ("0",)))
def test_inactive_tokens_change_nothing(seed: int, guarded: GuardedMemory, device: torch.device) -> None:
    """Rows whose last tokens are inactive, and a row without active tokens."""
    size, case = case_of([200, 140, 131, 10], 4, 1, 3, 16, FP32)
    tensors = several(build(case, guarded, device), size)
    q, cache, batch = tensors
    positions = batch.positions.view(-1, size).clone()
    live = torch.tensor([[4, 1, 0, 2], [0, 3, 4, 1], [2, 0, 1, 0]][seed], device=device)
    positions[torch.arange(size, device=device) >= live[:, None]] = INACTIVE
    # What the inactive tokens would have appended is not there.
    for row, count in enumerate(live.tolist()):
        for position in range(case.pieces[row][1] + count, case.pieces[row][1] + size):
            if count:
                page = int(cache.table[row, position // 64])
                cache.k[page, :, position % 64] = torch.nan
                cache.v[page, :, position % 64] = torch.nan
    part = Tensors(q, cache, replace(batch, positions=positions.flatten()))
    found, active = run(part, size), positions.flatten() >= 0
    assert torch.isfinite(found).all()
    expected = torch.cat(
        [
            attention_decode(
                q[token : token + 1],
                LayerCache(cache.k, cache.v, cache.table[token // size][None]),
                positions.flatten()[token : token + 1],
                AttentionScratch.of(1, 1, q.shape[1], q.shape[2], device),
            )
            for token in range(len(q))
        ]
    )
    assert_matches("attention", found[active], expected[active])


def test_a_scratch_serves_calls_of_any_sizes(guarded: GuardedMemory, device: torch.device) -> None:
    scratch = AttentionScratch.of(4, 1, 3, 16, device, max_tokens_per_row=8, max_tokens=12)
    for lengths, size in (([900, 20, 8], 4), ([257], 8), ([300, 640, 1, 5], 1), ([640, 131], 6), ([257], 1)):
        _, case = case_of(lengths, size, 1, 3, 16, FP32)
        tensors = several(build(case, guarded, device), size)
        assert_matches("attention", run(tensors, size, scratch), reference.attention(*tensors))


def test_a_row_beyond_the_cache_reads_up_to_its_end(guarded: GuardedMemory, device: torch.device) -> None:
    size, case = case_of([190, 100], 3, 2, 2, 16, FP32)
    q, cache, _ = build(case, guarded, device)
    cache.k.nan_to_num_(), cache.v.nan_to_num_(posinf=0.0)
    scratch = AttentionScratch.of(2, 2, 4, 16, device, max_tokens_per_row=size)
    last = cache.length - 1
    outside, nearest = (
        attention_decode(q, cache, torch.tensor(positions, device=device), scratch, tokens_per_row=size)
        for positions in ([last, last + 1, 2**40, -3, 0, -7], [last, last, last, 0, 0, 0])
    )
    assert torch.equal(outside, nearest)


def test_wrong_sizes_are_refused(guarded: GuardedMemory, device: torch.device) -> None:
    size, case = case_of([9, 20], 3, 2, 2, 16, FP32)
    q, cache, batch = build(case, guarded, device)
    for most, message in (
        ({}, "2 rows of 3 tokens .* got one for 2 rows of 1 tokens"),
        ({"max_tokens": 5}, "5 in all"),
    ):
        sizes = {"max_tokens_per_row": 3, **most} if most else {}
        scratch = AttentionScratch.of(2, 2, 4, 16, device, **sizes)
        with pytest.raises(ValueError, match=message):
            attention_decode(q, cache, batch.positions, scratch, tokens_per_row=size)
    scratch = AttentionScratch.of(2, 2, 4, 16, device, max_tokens_per_row=4)
    with pytest.raises(ValueError, match="q must have 4 tokens for each row, got 6 tokens"):
        attention_decode(q, cache, batch.positions, scratch, tokens_per_row=4)


@pytest.mark.parametrize(
    ("size", "groups", "itemsize", "tiles"), [(5, 4, 2, 1), (16, 8, 2, 2), (16, 4, 4, 4), (1, 24, 4, 2)]
)
def test_queries_are_packed_into_few_tiles(size: int, groups: int, itemsize: int, tiles: int) -> None:
    dtype = BF16 if itemsize == 2 else FP32
    cache = LayerCache.of(1, 64, 1, 16, dtype, torch.device("cpu"))
    dims = AttentionDims.of(torch.zeros(size, groups, 16, dtype=dtype), cache, size)
    assert dims.tiles == tiles and dims.tiles * dims.tile_heads >= size * groups
