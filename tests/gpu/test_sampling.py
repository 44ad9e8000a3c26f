"""The sampling kernels on an NVIDIA GPU: millions of draws against Meta's rule, and exact tokens against an oracle."""

import pytest
import torch
from torch import Tensor

from fastllama.benchmarks.near_ties import possible_tokens
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.sampling.sample import sample
from fastllama.kernels.sampling.scratch import SamplingScratch
from tests.kernels.cases import DTYPES, random
from tests.kernels.sampling.draws import (
    assert_follows,
    metas_distribution,
    numbers_drawn,
    rows_of,
    sampling,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
    pytest.mark.timeout(600),
]

DRAWS = 10_000_000
ROWS = {1000: 200_000, 128256: 4000}  # per launch, by vocabulary: about 1 GB of logits, and twice that of scratch
ORACLE_ROWS = 200  # at most; ORACLE_LOGITS limits them further, because the oracle sorts logits on the CPU
ORACLE_LOGITS = 16_000_000
MAX_NEAR_BOUNDARY = 20  # rows so near a boundary that rounding in float32 may give another token than the oracle's
RUNS = 100
FLAT_VOCABULARIES = (128256, 262144)
NEAR_ALL_MASS = 2e-5  # possible error of float32 sums over a complete vocabulary, plus the mass of its lowest ties
MANY_ROWS = 70_000  # more than a grid's second dimension allows
DEVICE = torch.device("cuda")


def scratch_for(logits: Tensor) -> SamplingScratch:
    return SamplingScratch.of(logits.shape[0], logits.shape[1], logits.device)


def draw_counts(row: Tensor, temperature: float, top_p: float, rows: int, draws: int) -> Tensor:
    """How often each token (V,) is drawn from one row of logits, in launches of `rows` draws."""
    logits = row.to(DEVICE).expand(rows, -1).contiguous()
    scratch = scratch_for(logits)
    params = sampling([temperature], [top_p], [(11, stream, 0) for stream in range(rows)], DEVICE)
    counts = torch.zeros(len(row), dtype=torch.int64, device=DEVICE)
    for position in range(-(-draws // rows)):
        tokens, _ = sample(logits, params, torch.full_like(params.seed, position), scratch)
        counts += torch.bincount(tokens, minlength=len(row))
    assert not scratch.counters.any()
    return counts.cpu()


def drawn(logits: Tensor, params: SamplingTensors) -> tuple[Tensor, Tensor]:
    """One draw per row, at position 0."""
    return sample(logits, params, torch.zeros_like(params.seed), scratch_for(logits))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.7, 0.5), (1.5, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sample_follows_metas_distribution_over_1000_tokens(
    dtype: torch.dtype, temperature: float, top_p: float
) -> None:
    row = (random(1000, seed=1) * 1.5).to(dtype)
    counts = draw_counts(row, temperature, top_p, ROWS[1000], DRAWS)
    assert int(counts.sum()) >= DRAWS
    assert_follows(counts, metas_distribution(row, temperature, top_p))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (0.8, 0.95)], ids=str)
def test_sample_follows_metas_distribution_over_128256_tokens(temperature: float, top_p: float) -> None:
    row = (random(128256, seed=2) * 3).bfloat16()
    counts = draw_counts(row, temperature, top_p, ROWS[128256], DRAWS)
    assert int(counts.sum()) >= DRAWS
    assert_follows(counts, metas_distribution(row, temperature, top_p))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("vocabulary", [1000, 3457, 128256, 262144], ids=lambda v: f"V{v}")
def test_sample_draws_what_the_oracle_draws(vocabulary: int, dtype: torch.dtype) -> None:
    rows = min(ORACLE_ROWS, ORACLE_LOGITS // vocabulary)
    spread = torch.tensor([4.0, 2.0, 6.0]).repeat(rows)[:rows, None]
    logits = (random(rows, vocabulary, seed=3) * spread).to(dtype)
    temperatures, top_ps = [0.6, 0.8, 1.0, 0.3, 1e-300], [0.9, 0.5, 0.95, 1.0]
    params = sampling(
        [temperatures[row % 5] for row in range(rows)],
        [top_ps[row % 4] for row in range(rows)],
        [(row << 33, row, 2**32 - 1) for row in range(rows)],
        DEVICE,
    )
    tokens, logprobs = drawn(logits.to(DEVICE), params)
    near = 0
    for row, u in enumerate(numbers_drawn(params, torch.zeros_like(params.seed))):
        possible = possible_tokens(logits[row], float(params.temperature[row]), float(params.top_p[row]), u)
        assert int(tokens[row]) in possible, f"row {row} draws {int(tokens[row])}, the oracle {possible}"
        near += len(possible) > 1
    assert near <= MAX_NEAR_BOUNDARY
    expected = torch.log_softmax(logits.double(), -1).gather(1, tokens.cpu()[:, None])[:, 0]
    torch.testing.assert_close(logprobs.cpu().double(), expected, atol=1e-5, rtol=1e-5)


def test_sample_repeats_greedy_tokens_and_draws_bit_for_bit() -> None:
    """Tokens and log-probabilities are equal bit for bit, in any order of a launch's programs."""
    logits = (random(16, 128256, seed=4) * 2).bfloat16().to(DEVICE)
    logits[:, [5000, 120_000]] = 20.0
    params = sampling([0.0, 1.0] * 8, [0.9], [(5, row, 0) for row in range(16)], DEVICE)
    first = drawn(logits, params)
    assert first[0][::2].tolist() == [5000] * 8
    scratch, zero = scratch_for(logits), torch.zeros_like(params.seed)
    for _ in range(RUNS):
        again = sample(logits, params, zero, scratch)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("vocabulary", FLAT_VOCABULARIES, ids=lambda v: f"V{v}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sample_handles_flat_and_nearly_flat_rows(dtype: torch.dtype, vocabulary: int) -> None:
    """Every token is a candidate. Equal logits keep exactly the lowest ids; draws cover the complete vocabulary."""
    rows = 64
    params = sampling([1.0], [0.5], [(6, row, 0) for row in range(rows)], DEVICE)
    numbers = torch.tensor(numbers_drawn(params, torch.zeros_like(params.seed)), dtype=torch.float64)
    tokens, logprobs = drawn(torch.full((rows, vocabulary), -3.0, dtype=dtype, device=DEVICE), params)
    assert torch.equal(tokens.cpu(), (numbers * (vocabulary // 2 + 1)).long())
    expected = torch.full_like(logprobs, -float(torch.tensor(float(vocabulary)).log()))
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    wide = random(rows, vocabulary, seed=5).to(dtype).to(DEVICE)
    near_all = sampling([1.0], [1 - 1e-9], [(6, row, 0) for row in range(rows)], DEVICE)
    tokens, _ = drawn(wide, near_all)
    mass = torch.softmax(wide.double(), -1)
    before = torch.where(torch.arange(vocabulary, device=DEVICE) < tokens[:, None], mass, 0.0).sum(-1)
    past = numbers.to(DEVICE) - before  # within the token's own mass, except for rounding and the lowest ties
    assert bool(((past > -NEAR_ALL_MASS) & (past < mass.gather(1, tokens[:, None])[:, 0] + NEAR_ALL_MASS)).all())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sample_marks_rows_with_nan_or_infinity(dtype: torch.dtype) -> None:
    logits = (random(12, 128256, seed=6) * 3).to(dtype).to(DEVICE)
    params = sampling([0.0, 1.0] * 6, [0.9], [(7, row, 0) for row in range(12)], DEVICE)
    clean = drawn(logits, params)
    logits[2:4, 77], logits[4:6, 128255] = torch.nan, -torch.nan
    logits[6:8, 60_000], logits[8:10] = torch.inf, -torch.inf
    tokens, logprobs = drawn(logits, params)
    broken = torch.zeros(12, dtype=torch.bool, device=DEVICE)
    broken[2:10] = True
    assert bool((tokens[broken] == -1).all()) and bool(logprobs[broken].isnan().all())
    assert torch.equal(tokens[~broken], clean[0][~broken]) and torch.equal(logprobs[~broken], clean[1][~broken])


def test_sample_handles_more_rows_than_a_grid_dimension() -> None:
    row = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0], dtype=torch.bfloat16, device=DEVICE)
    params = sampling([0.0, 1.0], [0.9], [(8, 0, 0), (8, 1, 0)], DEVICE)
    many = rows_of(params, torch.arange(MANY_ROWS, device=DEVICE) % 2)
    expected = drawn(row.repeat(2, 1), params)[0].repeat(MANY_ROWS // 2)
    assert torch.equal(drawn(row.repeat(MANY_ROWS, 1), many)[0], expected)
