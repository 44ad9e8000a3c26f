"""The plain-torch ops match written-out formulas, with NaN in all memory that they must not read."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.batch import RaggedBatch, SamplingTensors, Segment
from tests.kernels.cases import random
from tests.kernels.guards import GuardedMemory
from tests.kernels.pages import dense, empty_cache, write_row

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def naive_attention(q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    """One token's heads q (H, D) over k and v (K, T, D), in float64."""
    groups = q.shape[0] // k.shape[0]
    out = torch.zeros_like(q, dtype=torch.float64)
    for head in range(q.shape[0]):
        keys, values = k[head // groups, : position + 1].double(), v[head // groups, : position + 1].double()
        weights = torch.softmax(keys @ q[head].double() / math.sqrt(q.shape[1]), 0)
        out[head] = weights @ values
    return out


ATTENTION_CASES = {
    "decode-equal": [(0, 69, 1), (1, 69, 1), (2, 69, 1)],
    "decode-ragged": [(0, 0, 1), (1, 30, 1), (2, 7, 1)],
    "decode-one-row-elsewhere": [(2, 12, 1)],
    "prefill": [(0, 0, 17), (1, 0, 5)],
    "chunks-and-decode": [(1, 60, 11), (0, 3, 1), (2, 8, 4)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bounds"])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_ignores_cache_past_end(
    monkeypatch: pytest.MonkeyPatch, guarded: GuardedMemory, case: str, exact: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(reference, "QUERY_BLOCK_TOKENS", 4)
    n_rows, n_kv_heads, groups, length, head_dim = 3, 2, 3, 97, 8
    k, v = (random(n_rows, n_kv_heads, length, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    batch = RaggedBatch.of([(row, start, [0] * count) for row, start, count in ATTENTION_CASES[case]], CPU)
    for segment in batch.segments:
        k[segment.row, :, segment.keys :] = torch.nan
        v[segment.row, :, segment.keys :] = torch.inf
    if not exact:
        segments = tuple(segment._replace(keys=length) for segment in batch.segments)
        batch = RaggedBatch(batch.tokens, batch.positions, batch.rows, segments, exact=False)
    cache = empty_cache(guarded, n_rows, length, n_kv_heads, head_dim, dtype, CPU)
    for row in range(n_rows):
        write_row(cache, row, k[row], v[row])
    q = random(len(batch.tokens), n_kv_heads * groups, head_dim, dtype=dtype, seed=3)
    out = reference.attention(q, cache, batch).view(q.shape)
    for token, (row, position) in enumerate(zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)):
        expected = naive_attention(q[token], k[row], v[row], position)
        torch.testing.assert_close(out[token].double(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_qkv_rotates_pairs_and_appends_at_the_tokens_positions(guarded: GuardedMemory) -> None:
    n_heads, n_kv_heads, head_dim, dim = 4, 2, 6, 10
    h, norm = random(3, dim, seed=1), random(dim, seed=2)
    weight = random((n_heads + 2 * n_kv_heads) * head_dim, dim, seed=3)
    angles = random(128, head_dim // 2, seed=4)
    rope = torch.stack([angles.cos(), angles.sin()], -1)
    cache = empty_cache(guarded, 2, 128, n_kv_heads, head_dim, torch.float32, CPU)
    batch = RaggedBatch.of([(1, 63, [0, 0]), (0, 11, [0])], CPU)
    packed = reference.pack(*weight.split([24, 12, 12]))
    q = reference.norm_qkv_rope_append(h, norm, packed, rope, cache, 1e-5, batch)

    normed = h / (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    heads = (normed @ weight.T).view(3, -1, head_dim)
    expected = heads.clone()
    for token, position in enumerate((63, 64, 11)):
        for pair in range(head_dim // 2):
            cos, sin = rope[position, pair]
            a, b = heads[token, :6, 2 * pair], heads[token, :6, 2 * pair + 1]
            expected[token, :6, 2 * pair], expected[token, :6, 2 * pair + 1] = a * cos - b * sin, a * sin + b * cos
    torch.testing.assert_close(q, expected[:, :4])
    k, v = dense(cache)
    for token, (row, position) in enumerate(((1, 63), (1, 64), (0, 11))):
        torch.testing.assert_close(k[row, :, position], expected[token, 4:6])
        torch.testing.assert_close(v[row, :, position], expected[token, 6:])
    assert (~cache.k.isnan()).sum() == (~cache.v.isnan()).sum() == 3 * n_kv_heads * head_dim


def test_tokens_outside_the_cache_append_to_no_row(guarded: GuardedMemory) -> None:
    cache = empty_cache(guarded, 2, 64, 1, 2, torch.float32, CPU)
    batch = RaggedBatch.of([(1, 3, [0, 0])], CPU)
    batch.positions.copy_(torch.tensor([-1, 64]))
    reference.rope_append(random(2, 8), torch.ones(65, 1, 2), cache, batch)
    assert all(one.isnan().all() for one in dense(cache))


def test_rms_norm_rounds_before_the_weight_as_llama3_does() -> None:
    x, weight = random(5, 33, dtype=torch.bfloat16, seed=1), random(33, dtype=torch.bfloat16, seed=2)
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(reference.rms_norm(x, weight, 1e-5), normed * weight)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_packed_weights_unpack_and_give_the_same_projections(dtype: torch.dtype) -> None:
    gate, up, down = (random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((24, 10), (24, 10), (10, 24))))
    h, norm = random(3, 10, dtype=dtype, seed=5), torch.ones(10, dtype=dtype)
    batch = RaggedBatch.of([(0, 0, [1, 2, 3])], CPU)
    packed = reference.pack(gate, up)
    for part, expected in zip(reference.unpack(packed, [24, 24]), (gate, up), strict=True):
        assert isinstance(part, torch.Tensor) and torch.equal(part, expected)
    normed = reference.rms_norm(h, norm, 1e-5)
    hidden = torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)
    torch.testing.assert_close(reference.norm_swiglu(h, norm, packed, 1e-5, batch), hidden)
    packed_down = reference.pack(down)
    torch.testing.assert_close(reference.linear_residual(hidden, packed_down, h, batch), h + hidden @ down.T)
    torch.testing.assert_close(reference.linear_residual(hidden, packed_down, None, batch), hidden @ down.T)
    torch.testing.assert_close(reference.norm_lm_head(h, norm, packed, 1e-5, batch), normed @ torch.cat([gate, up]).T)


def test_embed_never_reads_out_of_bounds() -> None:
    table = random(7, 4)
    batch = RaggedBatch.of([(0, 0, [3, -1, 7, 10**9])], CPU)
    assert torch.equal(reference.embed(table, batch), table[[3, 0, 6, 6]])


def sampling(temperature: float, top_p: float, rows: int, seed: int = 0) -> SamplingTensors:
    return SamplingTensors.of(temperature, top_p, [(seed, row, 0) for row in range(rows)], CPU)


def oracle_draw(logits: np.ndarray, temperature: float, top_p: float, u: float) -> int:
    """Top-p by its definition, in float64. Draws from tokens above the lowest kept logit by id, then from its ties."""
    mass = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    before = np.cumsum(mass[order]) - mass[order]
    kept = order[before <= top_p * mass.sum()] if top_p < 1 else order
    lowest = logits[kept].min()
    sequence = sorted(kept[logits[kept] > lowest]) + sorted(kept[logits[kept] == lowest])
    cumulative = np.cumsum(mass[sequence])
    return int(sequence[np.searchsorted(cumulative, u * cumulative[-1], side="right")])


@pytest.mark.parametrize("vocabulary", [2, 257, 1000])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0], ids=["flat", "wide", "peaked"])
def test_sample_draws_what_the_oracle_draws(vocabulary: int, spread: float) -> None:
    from fastllama.kernels.sampling.philox import uniform

    logits = (random(64, vocabulary, seed=vocabulary) * spread).bfloat16()  # bfloat16 makes ties
    positions = torch.arange(64)
    for temperature, top_p in ((1.0, 0.9), (0.6, 0.5), (1.7, 0.999), (0.3, 1.0), (5.0, 0.01)):
        params = sampling(temperature, top_p, 64)
        tokens, logprobs = reference.sample(logits, params, positions)
        u = uniform(params.seed, params.stream, params.call, positions)
        rows = logits.double().numpy()
        assert tokens.tolist() == [oracle_draw(row, temperature, top_p, float(u[i])) for i, row in enumerate(rows)]
        expected = torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize(
    ("equal", "top_p", "kept"), [(10, 0.9, 10), (10, 0.7, 8), (20, 0.9, 19), (4, 0.5, 3), (5, 1.0, 5)]
)
def test_top_p_keeps_tokens_up_to_and_at_the_boundary(equal: int, top_p: float, kept: int) -> None:
    """Equal logits put a boundary exactly at top_p: a token with exactly top_p of the mass before it is kept."""
    n = 600
    logits = torch.zeros(n, equal)
    tokens, _ = reference.sample(logits, sampling(1.0, top_p, n), torch.arange(n))
    assert set(tokens.tolist()) == set(range(kept))


def test_log_probabilities_stay_exact_at_large_logits() -> None:
    logits = torch.tensor([[1000.0, 988.0, 980.0]])
    _, logprobs = reference.sample(logits, sampling(0.0, 1.0, 1), torch.zeros(1, dtype=torch.long))
    assert logprobs.item() == pytest.approx(-math.log1p(math.exp(-12.0) + math.exp(-20.0)), abs=2e-7)


def test_sample_follows_metas_distribution() -> None:
    """Chi-square of 20,000 draws against the renormalised nucleus."""
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0, -1.0, 3.0])
    n, temperature, top_p = 20_000, 0.8, 0.95
    tokens, _ = reference.sample(
        logits.expand(n, -1), sampling(temperature, top_p, n), torch.zeros(n, dtype=torch.long)
    )
    probs = torch.softmax(logits / temperature, -1).double()
    ordered = probs.sort(descending=True, stable=True)
    keep = ordered.indices[(ordered.values.cumsum(0) - ordered.values) <= top_p]
    expected = torch.zeros(6, dtype=torch.float64)
    expected[keep] = probs[keep] / probs[keep].sum() * n
    counts = torch.bincount(tokens, minlength=6).double()
    assert counts[expected == 0].sum() == 0 and len(keep) == 4
    live = expected > 0
    assert (((counts - expected) ** 2)[live] / expected[live]).sum().item() < 16.3  # 99.9%, 3 degrees of freedom


def test_sample_greedy_takes_the_lowest_of_ties_and_mixes_with_draws() -> None:
    logits = torch.zeros(3, 50, dtype=torch.bfloat16)
    logits[:, [7, 30]] = 2.0
    params = sampling(1.0, 0.9, 3)
    mixed = SamplingTensors(
        torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.9, 0.0, 0.9]), params.seed, params.stream, params.call, False
    )
    tokens, logprobs = reference.sample(logits, mixed, torch.zeros(3, dtype=torch.long))
    assert tokens[:2].tolist() == [7, 7]
    alone, _ = reference.sample(logits, params, torch.zeros(3, dtype=torch.long))
    assert tokens[2] == alone[2]
    assert reference.sample(logits, sampling(0.0, 0.9, 3), torch.zeros(3, dtype=torch.long))[0].tolist() == [7] * 3
    assert torch.allclose(logprobs[0], torch.log_softmax(logits[0].float(), -1)[7])


@pytest.mark.parametrize("greedy", [True, False])
def test_sample_marks_rows_with_nan_or_infinity(greedy: bool) -> None:
    logits = random(5, 20)
    logits[1, 3], logits[2, 4], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, :19] = -torch.inf  # one token left is a distribution
    tokens, _ = reference.sample(logits, sampling(0.0 if greedy else 1.0, 1.0, 5), torch.zeros(5, dtype=torch.long))
    assert tokens[1:4].tolist() == [-1, -1, -1] and tokens[0] >= 0 and tokens[4] == 19


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    logits, params, positions = random(6, 100), sampling(1.0, 0.95, 6), torch.arange(6)
    together, _ = reference.sample(logits, params, positions)
    for row in range(6):
        parts = {
            name: getattr(params, name)[row : row + 1] for name in ("temperature", "top_p", "seed", "stream", "call")
        }
        one = SamplingTensors(**parts, greedy=False)
        assert reference.sample(logits[row : row + 1], one, positions[row : row + 1])[0] == together[row]


def test_ragged_batch_holds_rows_one_after_the_other() -> None:
    batch = RaggedBatch.of([(2, 5, [10, 11]), (0, 0, [12])], CPU)
    assert batch.tokens.tolist() == [10, 11, 12] and batch.positions.tolist() == [5, 6, 0]
    assert batch.rows.tolist() == [2, 2, 0]
    assert batch.segments == (Segment(2, 0, 2, 7), Segment(0, 2, 3, 1)) and not batch.is_decode_step
    assert RaggedBatch.of([(0, 5, [1]), (1, 2, [2])], CPU).is_decode_step
