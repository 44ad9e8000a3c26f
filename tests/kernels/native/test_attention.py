"""Native attention: against the reference and float64, with NaN in everything that it must not read."""

from dataclasses import replace

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import native, reference
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.paged_cache import LayerCache
from tests.kernels.attention.cases import BF16, FP16, FP32, Case, build, decode_case, oracle
from tests.kernels.cases import random
from tests.kernels.guards import GuardedMemory
from tests.kernels.native.pages import NO_PAGES, no_page

CPU = torch.device("cpu")
CASE_LIST = [
    decode_case([1], 2, 4, 64, BF16),
    decode_case([63, 64, 65], 2, 4, 64, BF16),
    decode_case([127, 128, 129, 1, 2], 1, 7, 48, BF16),
    decode_case([1, 700, 33], 2, 4, 64, FP16),
    decode_case([511, 512, 513, 1024, 1025], 2, 2, 20, FP32),
    decode_case([1000], 1, 3, 128, FP32),
    decode_case([300, 1, 300], 1, 16, 256, BF16),
    decode_case([517, 3], 1, 20, 8, FP32),
    decode_case([141, 9], 1, 2, 6, BF16),
    decode_case([1 + 37 * row % 301 for row in range(40)], 1, 4, 16, FP32),
    decode_case([9000, 8191, 8192, 5], 1, 2, 8, FP32),
    Case([(0, 3, 4), (2, 600, 5)], 2, 3, 32, FP32),
    Case([(1, 0, 16)], 2, 2, 64, FP16),
    Case([(0, 0, 20), (1, 5, 9)], 2, 2, 16, FP32),
    Case([(0, 1015, 30)], 1, 4, 24, FP16),
]
# S tokens a row, within a block, across blocks and splits.
CHECKED = [
    Case([(0, 5, 2), (1, 700, 2), (2, 62, 2)], 2, 3, 64, FP32),
    Case([(0, 0, 5), (1, 60, 5), (2, 509, 5), (3, 1022, 5), (4, 3, 5)], 2, 4, 24, BF16),
    Case([(0, 510, 3), (1, 511, 3), (2, 127, 3)], 1, 7, 48, FP16),
    Case([(0, 56, 16), (1, 1530, 16), (2, 0, 16)], 1, 2, 6, FP32),
    Case([(row, 31 * row + 500, 4) for row in range(20)], 1, 5, 16, FP32),
    Case([(0, 8187, 8), (1, 9000, 8)], 1, 1, 8, FP32),
]

pytestmark = pytest.mark.usefixtures("isa", "threads")


@pytest.mark.parametrize("case", CASE_LIST, ids=lambda case: case.id)
def test_attention_matches_reference(case: Case, guarded: GuardedMemory) -> None:
    q, cache, batch = build(case, guarded, CPU)
    ours = native.attention(q, cache, batch)
    assert_matches("attention", ours, reference.attention(q, cache, batch))
    assert_matches("attention", ours, oracle(q, cache, batch))


def test_inactive_rows_read_nothing(guarded: GuardedMemory) -> None:
    """A row without a position, and a position after the cache, which stands for its end."""
    q, cache, batch = build(decode_case([700, 20, 768], 2, 2, 16, FP32), guarded, CPU)
    cache = cache._replace(table=guarded.copy(cache.table[:, :12]))
    assert cache.length == 768
    expected = native.attention(q, cache, batch)
    moved = replace(batch, positions=torch.tensor([699, -1, 2**40]))
    for pages in (cache.k, cache.v):
        pages[cache.table[1]] = torch.nan
    cache.table[1] = 2**31 - 1
    ours = native.attention(q, cache, moved)
    assert torch.equal(ours[::2], expected[::2]) and not ours[1].any()


@pytest.mark.parametrize("kind", NO_PAGES)
def test_table_entries_that_are_no_pages_read_nothing_outside_the_cache(kind: str, guarded: GuardedMemory) -> None:
    """Not those of a row's keys, nor those after them, which no prefetch follows. Other layers hold NaN."""
    q, cache, batch = build(decode_case([600, 700, 64], 2, 3, 16, FP32), guarded, CPU)
    expected = native.attention(q, cache, batch)
    cache.table[0, 10:], cache.table[1, 11:], cache.table[2, 1:] = (no_page(kind, cache),) * 3
    assert torch.equal(native.attention(q, cache, batch), expected)
    for pages in (cache.k, cache.v):
        pages.nan_to_num_(0.0, posinf=0.0)
    cache.table[0, 2:9] = no_page(kind, cache)
    ours = native.attention(q, cache, batch)
    assert ours[0].isfinite().all() and torch.equal(ours[1:], expected[1:])


def test_rows_share_pages(guarded: GuardedMemory) -> None:
    """Rows with the same beginning, and a page that stands in one row twice."""
    q, cache, batch = build(decode_case([600, 600, 300], 2, 2, 16, FP32), guarded, CPU)
    cache.table[1, :5] = cache.table[0, :5]
    cache.table[2, 3] = cache.table[2, 1]
    assert_matches("attention", native.attention(q, cache, batch), oracle(q, cache, batch))


def test_a_token_attends_with_the_same_result_in_any_batch(guarded: GuardedMemory) -> None:
    """Tokens of rows of one group and of several, together and a few at a time: bit for bit."""
    q, cache, batch = build(Case([(0, 1500, 12), (1, 5, 9)], 2, 2, 16, FP32), guarded, CPU)
    together = native.attention(q, cache, batch)
    assert together.shape[0] > native.MAX_MERGED_ROWS
    for begin in range(0, q.shape[0], 5):
        some = slice(begin, begin + 5)
        part = replace(batch, positions=batch.positions[some], rows=batch.rows[some])
        assert torch.equal(native.attention(q[some], cache, part), together[some])


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.id)
def test_tokens_of_a_row_attend_together_as_alone(case: Case, guarded: GuardedMemory) -> None:
    """Bit for bit, with inactive tokens at the end of a row, and NaN in the keys after each row."""
    q, cache, batch = build(case, guarded, CPU)
    per_row = case.pieces[0][2]
    for inactive in range(min(per_row, 3)):
        positions = batch.positions.view(-1, per_row).clone()
        positions[::2, per_row - inactive :] = -1
        some = replace(batch, positions=positions.flatten())
        ours = native.attention(q, cache, replace(some, tokens_per_row=per_row))
        assert torch.equal(ours, native.attention(q, cache, some))
        for s in range(per_row):
            one = slice(s, None, per_row)
            single = replace(some, positions=some.positions[one].contiguous(), rows=some.rows[one].contiguous())
            assert torch.equal(ours[one], native.attention(q[one].contiguous(), cache, single))
        if inactive == 0:
            assert_matches("attention", ours, oracle(q, cache, batch))
    moved = replace(batch, positions=torch.full_like(batch.positions, -1), tokens_per_row=per_row)
    assert not native.attention(q, cache, moved).any()


def test_many_tokens_attend_by_the_library(guarded: GuardedMemory) -> None:
    count = int(native.max_tokens(torch.float32)) + 1
    q, cache, batch = build(Case([(0, 0, count - 9), (1, 5, 9)], 2, 2, 16, FP32), guarded, CPU)
    expected = reference.attention(q, cache, batch)
    assert torch.equal(native.attention(q, cache, batch), expected)


def test_large_scores_stay_finite(guarded: GuardedMemory) -> None:
    q, cache, batch = build(decode_case([600], 1, 2, 16, FP32), guarded, CPU)
    q *= 300
    assert_matches("attention", native.attention(q, cache, batch), oracle(q, cache, batch))


def test_attention_rejects_what_does_not_belong_together() -> None:
    cache = LayerCache.of(2, 64, n_kv_heads=2, head_dim=8, dtype=FP32, device=CPU)
    half = cache.k[:, :, ::2]
    q, batch = random(2, 4, 8), RaggedBatch.of([(0, 1, [0]), (1, 1, [0])], CPU)
    refusals = {
        "q must be float32": lambda: native.attention(q.double(), cache, batch),
        "cache.v must have shape (3, 2, 64, 8)": lambda: native.attention(q, cache._replace(v=cache.v[:1]), batch),
        "cache.k must have shape (P, K, 64, D)": lambda: native.attention(q, cache._replace(k=half), batch),
        "cache.table must be torch.int32": lambda: native.attention(q, cache._replace(table=cache.table.long()), batch),
        "the cache must have pages, positions, kv heads": lambda: native.attention(
            q, cache._replace(k=cache.k[:0], v=cache.v[:0]), batch
        ),
        "a multiple of the cache's 2 heads, got (H, D) = (3, 8)": lambda: native.attention(
            q[:, :3].contiguous(), cache, batch
        ),
        "a batch must have tokens_per_row = 3 for every row, got 2": lambda: native.attention(
            q, cache, replace(batch, tokens_per_row=3)
        ),
        "batch.positions must have shape (1), got (2)": lambda: native.attention(q[:1], cache, batch),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
