"""The attention kernels at the sizes of real models, on a GPU: against float64, and equal in repeated runs."""

import math

import pytest
import torch
from torch import Tensor

from fastllama.benchmarks.tolerances import TOLERANCES
from fastllama.kernels.attention.decode import attention_decode
from fastllama.kernels.attention.prefill import attention_prefill
from fastllama.kernels.attention.scratch import AttentionScratch
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache, pages_for
from tests.kernels.cases import DTYPES, NAMES
from tests.kernels.pages import shuffled_table, write_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]

N_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3-8B
DECODE_LENGTHS = {
    "B1-T32768": [32768],
    "B1-T129": [129],
    "B4-T32768": [32768, 1, 777, 8192],
    "B16-T4099": [4099 - 273 * row for row in range(16)],
    "B64-T2047": [1 + 389 * row % 2047 for row in range(64)],
    "B64-T300": [300] * 64,
}
PREFILL_PIECES = {
    "N4096-T4096": [(0, 0, 4096)],
    "N4096-T5000": [(2, 0, 2600), (0, 4200, 800), (3, 0, 695), (1, 4095, 1)],
    "N1000-T32768": [(1, 31768, 1000)],
    "N20-T32768": [(0, 32763, 5), (1, 8000, 4), (3, 0, 11)],
}
HEADS = {"H32-K8-D128": (32, 8, 128), "H32-K8-D64": (32, 8, 64), "H8-K1-D128": (8, 1, 128), "H16-K2-D256": (16, 2, 256)}
LONG_ROWS, LONG_LENGTH = 17, 131072  # with pages in order, the last row starts after element 2^31 of its cache
SHARED_PAGES = 4
GARBAGE = (-1, 2**31 - 1, -(2**31), 0)  # entries of a table, three of which are no page's number
REPEATS = 100
ORACLE_TOKENS = 128  # at a time; their float64 scores over the longest row take less than a gigabyte


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, device=device)


def build(
    pieces: list[tuple[int, int, int]],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    in_order: bool = False,
) -> tuple[Tensor, LayerCache, RaggedBatch]:
    """q, one layer's cache with NaN after the rows' ends, and the batch. Pages are shuffled unless `in_order`."""
    n_heads, n_kv_heads, head_dim = heads
    batch = RaggedBatch.of([(row, start, [0] * count) for row, start, count in pieces], device)
    n_rows, longest = max(s.row for s in batch.segments) + 1, max(s.keys for s in batch.segments)
    table = shuffled_table(n_rows, longest + 3, device)
    if in_order:
        table = table.flatten().sort().values.view(table.shape)
    shape = (table.numel() + 1, n_kv_heads, PAGE_TOKENS, head_dim)
    k, v = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
    cache = LayerCache(k, v, table)
    for segment in batch.segments:
        keys, values = (
            random(n_kv_heads, segment.keys, head_dim, dtype=dtype, device=device, seed=10 * segment.row + seed)
            for seed in (1, 2)
        )
        write_row(cache, segment.row, keys, values)
    q = random(len(batch.tokens), n_heads, head_dim, dtype=dtype, device=device, seed=3)
    return q, cache, batch


def decode_pieces(lengths: list[int]) -> list[tuple[int, int, int]]:
    return [(row, length - 1, 1) for row, length in enumerate(lengths)]


def oracle(q: Tensor, cache: LayerCache, batch: RaggedBatch) -> Tensor:
    """Attention in float64, one kv head and a few tokens at a time."""
    n_heads, head_dim = q.shape[1:]
    n_kv_heads = cache.k.shape[1]
    groups = n_heads // n_kv_heads
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for segment in batch.segments:
        row = cache.rows(segment.row, segment.row + 1, segment.keys)
        for kv_head in range(n_kv_heads):
            heads = slice(kv_head * groups, (kv_head + 1) * groups)
            keys, values = (one[0, kv_head].double() for one in row)
            for begin in range(segment.begin, segment.end, ORACLE_TOKENS):
                tokens = slice(begin, min(begin + ORACLE_TOKENS, segment.end))
                scores = q[tokens, heads].double() @ keys.T / math.sqrt(head_dim)
                future = torch.arange(segment.keys, device=q.device) > batch.positions[tokens, None]
                out[tokens, heads] = torch.softmax(scores.masked_fill_(future[:, None], -torch.inf), -1) @ values
    return out.flatten(1)


def assert_near(ours: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES["attention", ours.dtype]
    torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)


def scratch_for(q: Tensor, cache: LayerCache, tokens_per_row: int = 1) -> AttentionScratch:
    n_tokens, n_heads, head_dim = q.shape
    rows, n_kv_heads = n_tokens // tokens_per_row, cache.k.shape[1]
    return AttentionScratch.of(rows, n_kv_heads, n_heads, head_dim, q.device, max_tokens_per_row=tokens_per_row)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=NAMES.get)
@pytest.mark.parametrize("case", DECODE_LENGTHS)
def test_attention_decode_matches_float64(case: str, dtype: torch.dtype, device: torch.device) -> None:
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    q, cache, batch = build(decode_pieces(DECODE_LENGTHS[case]), heads, dtype, device)
    scratch = scratch_for(q, cache)
    out = attention_decode(q, cache, batch.positions, scratch)
    assert not scratch.counters.any()
    assert_near(out, oracle(q, cache, batch))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=NAMES.get)
@pytest.mark.parametrize("case", PREFILL_PIECES)
def test_attention_prefill_matches_float64(case: str, dtype: torch.dtype, device: torch.device) -> None:
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    q, cache, batch = build(PREFILL_PIECES[case], heads, dtype, device)
    assert_near(attention_prefill(q, cache, batch), oracle(q, cache, batch))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=NAMES.get)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_matches_float64_for_other_heads(heads: str, dtype: torch.dtype, device: torch.device) -> None:
    lengths = DECODE_LENGTHS["B4-T32768"]
    q, cache, batch = build(decode_pieces(lengths), HEADS[heads], dtype, device)
    out = attention_decode(q, cache, batch.positions, scratch_for(q, cache))
    assert_near(out, oracle(q, cache, batch))
    q, cache, batch = build(PREFILL_PIECES["N4096-T5000"], HEADS[heads], dtype, device)
    assert_near(attention_prefill(q, cache, batch), oracle(q, cache, batch))


def test_attention_reaches_beyond_32_bits(device: torch.device) -> None:
    """Both kernels at the end of a cache whose last row starts after 2^31 elements."""
    q, cache, batch = build(
        decode_pieces([1 + 100 * row for row in range(LONG_ROWS - 1)] + [LONG_LENGTH]),
        (N_HEADS, N_KV_HEADS, HEAD_DIM),
        torch.bfloat16,
        device,
        in_order=True,
    )
    assert_both_kernels_match(q, cache, batch)


def assert_both_kernels_match(q: Tensor, cache: LayerCache, batch: RaggedBatch) -> None:
    """A decode step's tokens, by both kernels."""
    expected = oracle(q, cache, batch)
    assert_near(attention_decode(q, cache, batch.positions, scratch_for(q, cache)), expected)
    assert_near(attention_prefill(q, cache, batch), expected)


def test_rows_share_pages(device: torch.device) -> None:
    """Rows that begin alike have the same shuffled pages at their beginning, and pages of their own afterwards."""
    heads, begin = (N_HEADS, N_KV_HEADS, HEAD_DIM), SHARED_PAGES * PAGE_TOKENS
    q, cache, batch = build(decode_pieces([begin, begin + 1, 4099, 777]), heads, torch.bfloat16, device)
    apart = oracle(q, cache, batch)
    cache.table[:, :SHARED_PAGES] = cache.table[2, :SHARED_PAGES].clone()
    assert not torch.allclose(oracle(q, cache, batch)[0], apart[0], atol=TOLERANCES["attention", q.dtype])
    assert_both_kernels_match(q, cache, batch)
    q, cache, batch = build([(2, begin - 40, 500), (0, begin, 90), (1, 0, begin)], heads, torch.bfloat16, device)
    cache.table[:, :SHARED_PAGES] = cache.table[2, :SHARED_PAGES].clone()
    assert_near(attention_prefill(q, cache, batch), oracle(q, cache, batch))


@pytest.mark.parametrize("entry", GARBAGE)
def test_entries_of_pages_past_the_end_of_a_row_are_not_used(entry: int, device: torch.device) -> None:
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    for pieces in (decode_pieces([1, PAGE_TOKENS, PAGE_TOKENS + 1, 8192]), PREFILL_PIECES["N20-T32768"]):
        q, cache, batch = build(pieces, heads, torch.bfloat16, device)
        garbage = cache._replace(table=cache.table.clone())
        for segment in batch.segments:
            garbage.table[segment.row, pages_for(segment.keys) :] = entry
        assert torch.equal(attention_prefill(q, garbage, batch), attention_prefill(q, cache, batch))
        if batch.is_decode_step:
            plain, ours = (attention_decode(q, one, batch.positions, scratch_for(q, one)) for one in (cache, garbage))
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("case", ["B4-T32768", "B64-T2047"])
def test_attention_decode_repeats_bit_for_bit(case: str, device: torch.device) -> None:
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    q, cache, batch = build(decode_pieces(DECODE_LENGTHS[case]), heads, torch.bfloat16, device)
    scratch = scratch_for(q, cache)
    first = attention_decode(q, cache, batch.positions, scratch)
    for _ in range(REPEATS):
        assert torch.equal(attention_decode(q, cache, batch.positions, scratch), first)


def test_attention_prefill_repeats_bit_for_bit(device: torch.device) -> None:
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    q, cache, batch = build(PREFILL_PIECES["N4096-T5000"], heads, torch.bfloat16, device)
    first = attention_prefill(q, cache, batch)
    for _ in range(REPEATS):
        assert torch.equal(attention_prefill(q, cache, batch), first)


def test_attention_decode_replays_like_eager(device: torch.device) -> None:
    """One captured launch serves rows of any lengths, which are read on the device."""
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    lengths = DECODE_LENGTHS["B4-T32768"]
    q, cache, batch = build(decode_pieces([max(lengths)] * len(lengths)), heads, torch.bfloat16, device)
    scratch, eager_scratch = scratch_for(q, cache), scratch_for(q, cache)
    positions = torch.zeros_like(batch.positions)
    attention_decode(q, cache, positions, scratch)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = attention_decode(q, cache, positions, scratch)
    for shift in range(len(lengths)):
        positions.copy_(torch.tensor(lengths).roll(shift) - 1)
        graph.replay()
        assert torch.equal(replayed, attention_decode(q, cache, positions, eager_scratch))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=NAMES.get)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("lengths", "size"), [([32768], 5), ([129], 16), ([32768, 5, 777, 8192], 4), ([300] * 64, 2)])
def test_several_tokens_match_float64(
    lengths: list[int], size: int, heads: str, dtype: torch.dtype, device: torch.device
) -> None:
    pieces = [(row, length - size, size) for row, length in enumerate(lengths)]
    q, cache, batch = build(pieces, HEADS[heads], dtype, device)
    scratch = scratch_for(q, cache, size)
    out = attention_decode(q, cache, batch.positions, scratch, tokens_per_row=size)
    assert not scratch.counters.any()
    assert_near(out, oracle(q, cache, batch))
    for _ in range(REPEATS // 10):
        assert torch.equal(attention_decode(q, cache, batch.positions, scratch, tokens_per_row=size), out)


def test_several_tokens_replay_like_eager(device: torch.device) -> None:
    heads, size = (N_HEADS, N_KV_HEADS, HEAD_DIM), 4
    lengths = torch.tensor(DECODE_LENGTHS["B4-T32768"]).clamp(min=size)
    pieces = [(row, int(lengths.max()) - size, size) for row in range(len(lengths))]
    q, cache, batch = build(pieces, heads, torch.bfloat16, device)
    scratch, eager_scratch = scratch_for(q, cache, size), scratch_for(q, cache, size)
    positions = torch.zeros_like(batch.positions)
    attention_decode(q, cache, positions, scratch, tokens_per_row=size)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = attention_decode(q, cache, positions, scratch, tokens_per_row=size)
    for shift in range(len(lengths)):
        ends = lengths.roll(shift)[:, None] - size + torch.arange(size)
        ends[shift, 2:] = -1  # inactive
        positions.copy_(ends.flatten())
        graph.replay()
        assert torch.equal(replayed, attention_decode(q, cache, positions, eager_scratch, tokens_per_row=size))
