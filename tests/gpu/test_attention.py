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
from tests.kernels.cases import DTYPES, NAMES

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
LONG_ROWS, LONG_LENGTH = 17, 131072  # the last row starts at element 2^31 of its cache
REPEATS = 100
ORACLE_TOKENS = 128  # at a time; their float64 scores over the longest row take less than a gigabyte


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, device=device)


def build(
    pieces: list[tuple[int, int, int]], heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, RaggedBatch]:
    """q, one layer's cache_k and cache_v, and the batch. The caches hold NaN after the rows' ends."""
    n_heads, n_kv_heads, head_dim = heads
    batch = RaggedBatch.of([(row, start, [0] * count) for row, start, count in pieces], device)
    n_rows, longest = max(s.row for s in batch.segments) + 1, max(s.keys for s in batch.segments)
    shape = (n_rows, n_kv_heads, longest + 3, head_dim)
    cache_k, cache_v = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
    for seed, cache in ((1, cache_k), (2, cache_v)):
        for segment in batch.segments:
            values = cache[segment.row, :, : segment.keys]
            values.copy_(random(*values.shape, dtype=dtype, device=device, seed=10 * segment.row + seed))
    q = random(len(batch.tokens), n_heads, head_dim, dtype=dtype, device=device, seed=3)
    return q, cache_k, cache_v, batch


def decode_pieces(lengths: list[int]) -> list[tuple[int, int, int]]:
    return [(row, length - 1, 1) for row, length in enumerate(lengths)]


def oracle(q: Tensor, cache_k: Tensor, cache_v: Tensor, batch: RaggedBatch) -> Tensor:
    """Attention in float64, one kv head and a few tokens at a time."""
    n_heads, head_dim = q.shape[1:]
    groups = n_heads // cache_k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for segment in batch.segments:
        for kv_head in range(cache_k.shape[1]):
            heads = slice(kv_head * groups, (kv_head + 1) * groups)
            keys, values = (cache[segment.row, kv_head, : segment.keys].double() for cache in (cache_k, cache_v))
            for begin in range(segment.begin, segment.end, ORACLE_TOKENS):
                tokens = slice(begin, min(begin + ORACLE_TOKENS, segment.end))
                scores = q[tokens, heads].double() @ keys.T / math.sqrt(head_dim)
                future = torch.arange(segment.keys, device=q.device) > batch.positions[tokens, None]
                out[tokens, heads] = torch.softmax(scores.masked_fill_(future[:, None], -torch.inf), -1) @ values
    return out.flatten(1)


def assert_near(ours: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES["attention", ours.dtype]
    torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)


def scratch_for(q: Tensor, cache_k: Tensor) -> AttentionScratch:
    rows, n_heads, head_dim = q.shape
    return AttentionScratch.of(rows, cache_k.shape[1], n_heads, head_dim, q.device)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=NAMES.get)
@pytest.mark.parametrize("case", DECODE_LENGTHS)
def test_attention_decode_matches_float64(case: str, dtype: torch.dtype, device: torch.device) -> None:
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    q, cache_k, cache_v, batch = build(decode_pieces(DECODE_LENGTHS[case]), heads, dtype, device)
    scratch = scratch_for(q, cache_k)
    out = attention_decode(q, cache_k, cache_v, batch.positions, scratch)
    assert not scratch.counters.any()
    assert_near(out, oracle(q, cache_k, cache_v, batch))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=NAMES.get)
@pytest.mark.parametrize("case", PREFILL_PIECES)
def test_attention_prefill_matches_float64(case: str, dtype: torch.dtype, device: torch.device) -> None:
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    q, cache_k, cache_v, batch = build(PREFILL_PIECES[case], heads, dtype, device)
    assert_near(attention_prefill(q, cache_k, cache_v, batch), oracle(q, cache_k, cache_v, batch))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=NAMES.get)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_matches_float64_for_other_heads(heads: str, dtype: torch.dtype, device: torch.device) -> None:
    lengths = DECODE_LENGTHS["B4-T32768"]
    q, cache_k, cache_v, batch = build(decode_pieces(lengths), HEADS[heads], dtype, device)
    out = attention_decode(q, cache_k, cache_v, batch.positions, scratch_for(q, cache_k))
    assert_near(out, oracle(q, cache_k, cache_v, batch))
    q, cache_k, cache_v, batch = build(PREFILL_PIECES["N4096-T5000"], HEADS[heads], dtype, device)
    assert_near(attention_prefill(q, cache_k, cache_v, batch), oracle(q, cache_k, cache_v, batch))


def test_attention_reaches_beyond_32_bits(device: torch.device) -> None:
    """Both kernels at the end of a cache whose last row starts after 2^31 elements."""
    q, cache_k, cache_v, batch = build(
        decode_pieces([1 + 100 * row for row in range(LONG_ROWS - 1)] + [LONG_LENGTH]),
        (N_HEADS, N_KV_HEADS, HEAD_DIM),
        torch.bfloat16,
        device,
    )
    expected = oracle(q, cache_k, cache_v, batch)
    assert_near(attention_decode(q, cache_k, cache_v, batch.positions, scratch_for(q, cache_k)), expected)
    assert_near(attention_prefill(q, cache_k, cache_v, batch), expected)


@pytest.mark.parametrize("case", ["B4-T32768", "B64-T2047"])
def test_attention_decode_repeats_bit_for_bit(case: str, device: torch.device) -> None:
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    q, cache_k, cache_v, batch = build(decode_pieces(DECODE_LENGTHS[case]), heads, torch.bfloat16, device)
    scratch = scratch_for(q, cache_k)
    first = attention_decode(q, cache_k, cache_v, batch.positions, scratch)
    for _ in range(REPEATS):
        assert torch.equal(attention_decode(q, cache_k, cache_v, batch.positions, scratch), first)


def test_attention_prefill_repeats_bit_for_bit(device: torch.device) -> None:
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    q, cache_k, cache_v, batch = build(PREFILL_PIECES["N4096-T5000"], heads, torch.bfloat16, device)
    first = attention_prefill(q, cache_k, cache_v, batch)
    for _ in range(REPEATS):
        assert torch.equal(attention_prefill(q, cache_k, cache_v, batch), first)


def test_attention_decode_replays_like_eager(device: torch.device) -> None:
    """One captured launch serves rows of any lengths, which are read on the device."""
    heads = N_HEADS, N_KV_HEADS, HEAD_DIM
    lengths = DECODE_LENGTHS["B4-T32768"]
    q, cache_k, cache_v, batch = build(decode_pieces([max(lengths)] * len(lengths)), heads, torch.bfloat16, device)
    scratch, eager_scratch = scratch_for(q, cache_k), scratch_for(q, cache_k)
    positions = torch.zeros_like(batch.positions)
    attention_decode(q, cache_k, cache_v, positions, scratch)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = attention_decode(q, cache_k, cache_v, positions, scratch)
    for shift in range(len(lengths)):
        positions.copy_(torch.tensor(lengths).roll(shift) - 1)
        graph.replay()
        assert torch.equal(replayed, attention_decode(q, cache_k, cache_v, positions, eager_scratch))
