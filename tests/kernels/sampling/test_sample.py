"""The sampling kernels match a float64 oracle, the reference and Meta's distribution, also for unusual logits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastllama.benchmarks.near_ties import possible_tokens
from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import reference
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.sampling.sample import sample
from fastllama.kernels.sampling.scratch import SamplingScratch
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory
from tests.kernels.sampling.draws import (
    assert_follows,
    metas_distribution,
    numbers_drawn,
    rows_of,
    sampling,
    stream_near,
)
from tests.support.tiers import parameters

# (temperature, top_p): usual values, everything kept, almost everything, one token, and values beyond float32's range.
PARAMETERS = [
    (1.0, 0.9),
    (0.6, 0.5),
    (1.7, 0.999),
    (0.3, 1.0),
    (5.0, 0.01),
    (1000.0, 1 - 1e-9),
    (1e300, 0.7),
    (1e-300, 0.9),
    (0.8, 1e-300),
    (2.0, 7.0),
]
CHI_SQUARE_DRAWS = {"cpu": 1_200, "cuda": 200_000}
NEAR_ONE, NEAR_ZERO = 1 - 1e-5, 1e-5


def drawn(logits: Tensor, params: SamplingTensors, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sample with a new scratch, whose counters must be zero afterwards."""
    positions = torch.zeros_like(params.seed) if positions is None else positions
    scratch = SamplingScratch.of(logits.shape[0], logits.shape[1], logits.device)
    tokens, logprobs = sample(logits, params, positions, scratch)
    assert not scratch.counters.any()
    return tokens, logprobs


def assert_exact(logits: Tensor, params: SamplingTensors, positions: Tensor) -> int:
    """Assert that tokens equal the oracle's and the reference's where float32 is precise enough.

    Returns the number of rows where it is not.
    """
    tokens, logprobs = drawn(logits, params, positions)
    expected, _ = reference.sample(logits, params, positions)
    near = 0
    for row, u in enumerate(numbers_drawn(params, positions)):
        possible = possible_tokens(logits[row], float(params.temperature[row]), float(params.top_p[row]), u)
        assert int(tokens[row]) in possible, f"row {row} draws {int(tokens[row])}, the oracle {possible}"
        if len(possible) == 1:
            assert tokens[row] == expected[row]
        near += len(possible) > 1
    assert_matches("sample", logprobs, torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None])[:, 0])
    return near


@pytest.mark.parametrize("dtype", parameters(DTYPES, quick=("bf16",)))
@pytest.mark.parametrize(
    "vocabulary", parameters({f"V{v}": v for v in (1, 2, 257, 2049, 3456)}, quick=("V1", "V257", "V2049"))
)
def test_sample_draws_what_the_oracle_draws(
    vocabulary: int, dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    rows = len(PARAMETERS)
    spread = torch.tensor([2.0, 0.5, 1.0, 6.0, 3.0] * (rows // 5))[:, None]
    logits = guarded.copy((random(rows, vocabulary, seed=vocabulary) * spread).to(dtype).to(device))
    streams = [(2**64 - 1 - row * 2**40, 2**32 - 1 - row, 2**31 + row) for row in range(rows)]
    params = sampling([t for t, _ in PARAMETERS], [p for _, p in PARAMETERS], streams, device)
    assert assert_exact(logits, params, torch.arange(rows, device=device) * 1000) <= 1


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "spread"),
    [
        pytest.param(128256, torch.bfloat16, 3.0, id="V128256-bf16"),
        pytest.param(128256, torch.float32, 2.0, id="V128256-fp32", marks=pytest.mark.slow),
        pytest.param(262144, torch.bfloat16, 1.0, id="V262144-bf16", marks=pytest.mark.slow),
    ],
)
def test_sample_handles_large_vocabularies(
    vocabulary: int, dtype: torch.dtype, spread: float, device: torch.device
) -> None:
    cases = [(0.6, 0.9), (1.0, 0.95)] if vocabulary == 128256 else [(0.2, 0.9)]
    logits = (random(len(cases), vocabulary, seed=1) * spread).to(dtype).to(device)
    params = sampling([t for t, _ in cases], [p for _, p in cases], [(2, row, 0) for row in range(len(cases))], device)
    assert assert_exact(logits, params, torch.zeros_like(params.seed)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [0.85, 1.0])
def test_sample_follows_metas_distribution(top_p: float, device: torch.device) -> None:
    draws = CHI_SQUARE_DRAWS[device.type] // 2
    row = torch.tensor([2.5, 3.0, 3.0, 2.25, 1.0, 3.5, 0.0, 2.25, 2.25], dtype=torch.bfloat16)
    params = sampling([0.8], [top_p], [(7, draw, 0) for draw in range(draws)], device)
    tokens, _ = drawn(row.to(device).expand(draws, -1).contiguous(), params)
    assert_follows(torch.bincount(tokens, minlength=len(row)), metas_distribution(row, 0.8, top_p))


@pytest.mark.parametrize(
    ("equal", "top_p", "kept"),
    [(10, 0.9, 10), (10, 0.7, 8), (20, 0.9, 19), (4, 0.5, 3), (5, 1.0, 5), (2500, 0.5, 1251), (4096, 0.75, 3073)],
)
def test_sample_keeps_the_lowest_ids_of_flat_rows(equal: int, top_p: float, kept: int, device: torch.device) -> None:
    """Equal logits: the lowest ids with at most top_p before them are kept. A number near 1 draws the last one."""
    logits = torch.full((2, equal), 0.5, dtype=torch.bfloat16, device=device)
    params = sampling([1.0], [top_p], [stream_near(NEAR_ZERO), stream_near(NEAR_ONE)], device)
    assert drawn(logits, params)[0].tolist() == [0, kept - 1]


def test_sample_cuts_ties_at_the_threshold(device: torch.device) -> None:
    """All tokens above the threshold are kept, and the lowest ids of its ties, over two blocks. Ties are drawn last."""
    logits = torch.full((3, 3000), -30.0, device=device)
    logits[:, 2900], logits[:, 5], logits[:, 10:2600:259] = 1.0, 1.0, 0.0  # ten ties with 1 / e of a top token's mass
    share = 1 / (2 + 10 / torch.e)
    top_p = 2 * share + 3.5 * share / torch.e  # keeps four ties
    streams = [stream_near(u) for u in (NEAR_ZERO, 2 / (2 + 4 / torch.e) - 1e-4, NEAR_ONE)]
    assert drawn(logits, sampling([1.0], [top_p], streams, device))[0].tolist() == [5, 2900, 10 + 3 * 259]


def test_sample_treats_zeros_of_both_signs_as_equal(device: torch.device) -> None:
    logits = torch.tensor([[-9.0, -0.0, 0.0, -0.0, 0.0]], device=device).repeat(3, 1)
    params = sampling(
        [1.0, 1.0, 0.0], [0.6, 0.6, 0.6], [stream_near(NEAR_ZERO), stream_near(NEAR_ONE), (0, 0, 0)], device
    )
    assert drawn(logits, params)[0].tolist() == [1, 3, 1]  # three of four are kept, those with the lowest ids


@pytest.mark.parametrize("dtype", parameters(DTYPES, quick=("bf16",)))
def test_sample_keeps_one_token_or_all(dtype: torch.dtype, device: torch.device) -> None:
    logits = random(4, 2100, seed=5).to(dtype).to(device)
    logits[:, [30, 2080]] = 9.0
    logits[2:] = logits[2:] / 64 - 9.0  # negative, and nearly flat
    params = sampling([1.0, 1.0, 9.0, 9.0], [1e-300, 1.0, 1e-30, 1.0], [stream_near(NEAR_ONE)] * 4, device)
    expected, _ = reference.sample(logits, params, torch.zeros_like(params.seed))
    assert drawn(logits, params)[0].tolist() == expected.tolist()
    assert expected[0] == expected[2] == 30


@pytest.mark.parametrize("vocabulary", [50, 5000], ids=lambda v: f"V{v}")
def test_sample_greedy_takes_the_lowest_of_ties_and_mixes_with_draws(vocabulary: int, device: torch.device) -> None:
    logits = torch.zeros(4, vocabulary, dtype=torch.bfloat16, device=device)
    logits[:, [7, vocabulary - 3]] = 2.0
    params = sampling([0.0, 1.0, 1.0, 0.0], [0.9, 0.0, 0.9, 0.0], [(3, row, 0) for row in range(4)], device)
    tokens, logprobs = drawn(logits, params)
    expected, expected_logprobs = reference.sample(logits, params, torch.zeros_like(params.seed))
    assert tokens.tolist() == expected.tolist() and tokens[[0, 1, 3]].tolist() == [7, 7, 7]
    assert_matches("sample", logprobs, expected_logprobs)


def test_log_probabilities_stay_exact_at_large_logits(device: torch.device) -> None:
    logits = torch.tensor([[1000.0, 988.0, 980.0], [-1000.0, -1012.0, -1020.0]], device=device)
    expected = torch.log_softmax(torch.tensor([0.0, -12.0, -20.0], dtype=torch.float64), -1)[0].float()
    for temperature in (0.0, 1.0):
        params = sampling([temperature], [0.5], [(0, 0, 0)] * 2, device)
        assert (drawn(logits, params)[1].cpu() - expected).abs().max() < 2e-7


def test_sample_does_not_depend_on_other_rows_or_their_order(device: torch.device) -> None:
    logits, positions = random(6, 300, seed=2, device=device), torch.arange(6, device=device) * 7
    params = sampling([0.5, 1, 2, 1, 0, 1], [0.9, 0.9, 0.5, 1, 1, 0.2], [(9, row, 1) for row in range(6)], device)
    together = drawn(logits, params, positions)
    order = torch.tensor([3, 0, 5, 1], device=device)
    for rows in (order, torch.tensor([2], device=device), torch.tensor([4], device=device)):
        apart = drawn(logits[rows].contiguous(), rows_of(params, rows), positions[rows].contiguous())
        assert all(torch.equal(a, b[rows]) for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_marks_only_rows_with_nan_or_infinity(temperature: float, device: torch.device) -> None:
    logits = random(8, 2100, seed=3, device=device)
    params = sampling([temperature], [0.9], [(4, row, 0) for row in range(8)], device)
    alone = [drawn(logits[[row]].contiguous(), rows_of(params, torch.tensor([row]))) for row in (0, 7)]
    logits[1, 3], logits[2, 2099], logits[3, 4], logits[4] = torch.nan, torch.nan, torch.inf, -torch.inf
    logits[5, 0], logits[5, 1] = torch.inf, -torch.nan
    logits[6] = -torch.inf
    logits[6, 2060] = -3.0  # one token left is a distribution
    tokens, logprobs = drawn(logits, params)
    assert tokens[1:6].tolist() == [-1] * 5 and logprobs[1:6].isnan().all()
    assert tokens[6] == 2060 and logprobs[6] == 0
    for row, (token, logprob) in zip((0, 7), alone, strict=True):
        assert tokens[row] == token[0] and logprobs[row] == logprob[0]


@pytest.mark.parametrize("top_p", [0.9, 0.999999, 1.0])
def test_sample_never_draws_masked_tokens(top_p: float, device: torch.device) -> None:
    logits = torch.full((2, 2100), -torch.inf, dtype=torch.float16, device=device)
    logits[:, [9, 10, 2090]] = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float16, device=device)
    params = sampling([1e300, 3.0], [top_p], [stream_near(NEAR_ONE), stream_near(NEAR_ZERO)], device)
    assert drawn(logits, params)[0].tolist() == [2090, 9]


def test_sample_repeats_bit_for_bit_in_a_scratch_of_more_rows(device: torch.device) -> None:
    """Values that calls with other rows and sizes left in the scratch have no effect."""
    scratch = SamplingScratch.of(5, 300, device)
    logits, params = (
        random(5, 300, seed=6, device=device),
        sampling([1.0], [0.9], [(5, row, 0) for row in range(5)], device),
    )
    zero = torch.zeros_like(params.seed)
    first = sample(logits, params, zero, scratch)
    few = torch.arange(2, device=device)
    flat = sample(torch.zeros(2, 300, device=device), rows_of(params, few), zero[:2], scratch)
    assert bool((flat[0] >= 0).all())
    again = sample(logits, params, zero, scratch)
    smaller = sample(logits[:2].contiguous(), rows_of(params, few), zero[:2], scratch)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[:2], b) for a, b in zip(first, smaller, strict=True))
    assert not scratch.counters.any()


def test_sample_recovers_from_an_interrupted_call(device: torch.device) -> None:
    logits, params = random(2, 2100, seed=8, device=device), sampling([1.0], [0.9], [(5, 0, 0), (5, 1, 0)], device)
    expected, scratch = drawn(logits, params), SamplingScratch.of(2, 2100, device)
    scratch.counters.fill_(1)  # one of two blocks was done
    scratch.reset()
    ours = sample(logits, params, torch.zeros_like(params.seed), scratch)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_sample_accepts_zero_rows(device: torch.device) -> None:
    params = rows_of(sampling([1.0], [0.9], [(0, 0, 0)], device), torch.zeros(0, dtype=torch.int64, device=device))
    tokens, logprobs = drawn(torch.zeros(0, 9, device=device), params)
    assert tokens.shape == logprobs.shape == (0,)


def test_sample_rejects_invalid_arguments(device: torch.device) -> None:
    logits, scratch = random(3, 80, device=device), SamplingScratch.of(3, 80, device)
    params, zero = sampling([1.0], [0.9], [(0, row, 0) for row in range(3)], device), torch.zeros(3, dtype=torch.int64)
    zero = zero.to(device)
    narrow = SamplingTensors(
        params.temperature.float(), params.top_p, params.seed, params.stream, params.call, greedy=False
    )
    refusals: dict[str, Callable[[], object]] = {
        "logits must be contiguous, got strides (1, 3)": lambda: sample(logits.T.contiguous().T, params, zero, scratch),
        "logits must be float32, bfloat16 or float16": lambda: sample(logits.double(), params, zero, scratch),
        "logits must have shape (B, V), got (80)": lambda: sample(logits[0], params, zero, scratch),
        "sampling.temperature must have shape (2), got (3)": lambda: sample(logits[:2], params, zero[:2], scratch),
        "sampling.temperature must be torch.float64": lambda: sample(logits, narrow, zero, scratch),
        "positions must be torch.int64, got torch.int32": lambda: sample(logits, params, zero.int(), scratch),
        "for at least 3 rows and a vocabulary of 80, got one for 2 rows": lambda: sample(
            logits, params, zero, SamplingScratch.of(2, 80, device)
        ),
        "and a vocabulary of 80, got one for 3 rows and 81": lambda: sample(
            logits, params, zero, SamplingScratch.of(3, 81, device)
        ),
        "a vocabulary of 1 to 262144 tokens, got 262145": lambda: SamplingScratch.of(1, 262145, device),
        "a vocabulary of 1 to 262144 tokens, got 0": lambda: SamplingScratch.of(1, 0, device),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)


@pytest.mark.parametrize("n_draws", parameters({"2": 2, "5": 5}, quick=("2",)))
def test_sample_draws_several_times_a_row(n_draws: int, device: torch.device) -> None:
    """Adjacent draws of a row are those with its parameters repeated."""
    rows = 3
    logits = random(rows * n_draws, 300, seed=9, device=device)
    positions = torch.arange(rows * n_draws, device=device) * 3
    params = sampling([1.0, 0.0, 0.7], [0.9, 0.9, 1.0], [(6, row, 1) for row in range(rows)], device)
    ours = drawn(logits, params, positions)
    assert all(torch.equal(a, b) for a, b in zip(ours, drawn(logits, params.repeated(n_draws), positions), strict=True))
