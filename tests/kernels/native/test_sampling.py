"""Native sampling: the reference's tokens for the same random numbers, and its log-probabilities."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import native, reference
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import DecodeState
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory
from tests.kernels.sampling.draws import rows_of, sampling, stream_near
from tests.kernels.sampling.test_sample import NEAR_ONE, NEAR_ZERO, PARAMETERS
from tests.kernels.sampling.test_sample_and_advance import ROWS, START, assert_same, logits_on, state_of

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("isa", "threads")


def assert_like_reference(logits: Tensor, how: SamplingTensors, positions: Tensor | None = None) -> Tensor:
    """Assert the reference's tokens and log-probabilities -> the tokens."""
    positions = torch.zeros(len(logits), dtype=torch.int64) if positions is None else positions
    ours, expected = native.sample(logits, how, positions), reference.sample(logits, how, positions)
    assert ours[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(ours[1], expected[1], atol=1e-5, rtol=1e-5, equal_nan=True)
    return ours[0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 257, 4096, 9001], ids=lambda v: f"V{v}")
def test_sample_draws_what_the_reference_draws(vocabulary: int, dtype: torch.dtype, guarded: GuardedMemory) -> None:
    rows = len(PARAMETERS)
    spread = torch.tensor([2.0, 0.5, 1.0, 6.0, 3.0] * (rows // 5))[:, None]
    logits = guarded.copy((random(rows, vocabulary, seed=vocabulary) * spread).to(dtype))
    for trial in range(5):
        streams = [(2**64 - 1 - row * 2**40, 2**32 - 1 - row - trial, 2**31 + row) for row in range(rows)]
        how = sampling([t for t, _ in PARAMETERS], [p for _, p in PARAMETERS], streams, CPU)
        assert_like_reference(logits, how, torch.arange(rows) * 1000)


@pytest.mark.parametrize("draws", [2, 3, 16])
def test_sample_draws_several_times_for_a_row_of_parameters(draws: int) -> None:
    rows = len(PARAMETERS)
    logits = random(rows * draws, 257, seed=draws) * 3
    how = sampling([t for t, _ in PARAMETERS], [p for _, p in PARAMETERS], [(7, row, 1) for row in range(rows)], CPU)
    positions = torch.arange(rows * draws) // draws * 50 + torch.arange(rows * draws) % draws
    tokens = assert_like_reference(logits, how, positions).view(rows, draws)
    for draw in range(draws):
        alone = native.sample(logits[draw::draws].contiguous(), how, positions[draw::draws].contiguous())[0]
        assert torch.equal(tokens[:, draw], alone)


def test_sample_takes_large_vocabularies() -> None:
    logits = (random(2, 128256, seed=1) * 3).to(torch.bfloat16)
    assert_like_reference(logits, sampling([0.6, 1.0], [0.9, 0.95], [(2, 0, 0), (2, 1, 0)], CPU))


@pytest.mark.parametrize(("equal", "top_p"), [(10, 0.9), (10, 0.7), (4, 0.5), (5, 1.0), (2500, 0.5), (5000, 0.75)])
def test_sample_keeps_the_lowest_ids_of_flat_rows(equal: int, top_p: float) -> None:
    logits = torch.full((2, equal), 0.5, dtype=torch.bfloat16)
    assert_like_reference(logits, sampling([1.0], [top_p], [stream_near(NEAR_ZERO), stream_near(NEAR_ONE)], CPU))


def test_sample_cuts_ties_at_the_threshold() -> None:
    logits = torch.full((3, 3000), -30.0)
    logits[:, 2900], logits[:, 5], logits[:, 10:2600:259] = 1.0, 1.0, 0.0
    share = 1 / (2 + 10 / torch.e)
    top_p = 2 * share + 3.5 * share / torch.e  # keeps four ties
    streams = [stream_near(u) for u in (NEAR_ZERO, 2 / (2 + 4 / torch.e) - 1e-4, NEAR_ONE)]
    assert assert_like_reference(logits, sampling([1.0], [top_p], streams, CPU)).tolist() == [5, 2900, 10 + 3 * 259]


def test_sample_takes_zeros_of_both_signs_as_equal() -> None:
    logits = torch.tensor([[-9.0, -0.0, 0.0, -0.0, 0.0]]).repeat(3, 1)
    how = sampling([1.0, 1.0, 0.0], [0.6, 0.6, 0.6], [stream_near(NEAR_ZERO), stream_near(NEAR_ONE), (0, 0, 0)], CPU)
    assert assert_like_reference(logits, how).tolist() == [1, 3, 1]


def test_sample_greedy_takes_the_lowest_of_ties_and_mixes_with_draws() -> None:
    for vocabulary in (50, 10000):
        logits = torch.zeros(4, vocabulary, dtype=torch.bfloat16)
        logits[:, [7, vocabulary - 3]] = 2.0
        how = sampling([0.0, 1.0, 1.0, 0.0], [0.9, 0.0, 0.9, 0.0], [(3, row, 0) for row in range(4)], CPU)
        assert assert_like_reference(logits, how)[[0, 1, 3]].tolist() == [7, 7, 7]


def test_sample_gives_log_probabilities_that_stay_exact_at_large_logits() -> None:
    logits = torch.tensor([[1000.0, 988.0, 980.0], [-1000.0, -1012.0, -1020.0]])
    expected = torch.log_softmax(torch.tensor([0.0, -12.0, -20.0], dtype=torch.float64), -1)[0].float()
    how = sampling([1.0], [0.5], [(0, 0, 0)] * 2, CPU)
    assert (native.sample(logits, how, torch.zeros_like(how.seed))[1] - expected).abs().max() < 2e-7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_marks_rows_that_are_not_numbers_and_only_those(temperature: float) -> None:
    logits = random(8, 5100, seed=3)
    how = sampling([temperature], [0.9], [(4, row, 0) for row in range(8)], CPU)
    logits[1, 3], logits[2, 5099], logits[3, 4], logits[4] = torch.nan, torch.nan, torch.inf, -torch.inf
    logits[5, 0], logits[5, 1] = torch.inf, -torch.nan
    logits[6] = -torch.inf
    logits[6, 5060] = -3.0  # one token left is a distribution
    tokens = assert_like_reference(logits, how)
    assert tokens[1:6].tolist() == [-1] * 5 and tokens[6] == 5060


@pytest.mark.parametrize("top_p", [0.9, 0.999999, 1.0])
def test_sample_never_draws_masked_tokens(top_p: float) -> None:
    logits = torch.full((2, 2100), -torch.inf, dtype=torch.float16)
    logits[:, [9, 10, 2090]] = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float16)
    how = sampling([1e300, 3.0], [top_p], [stream_near(NEAR_ONE), stream_near(NEAR_ZERO)], CPU)
    assert assert_like_reference(logits, how).tolist() == [2090, 9]


def test_sample_and_advance_matches_reference() -> None:
    """Rows that continue, are inactive, reach their last position or a stop token, or are not numbers."""
    positions = [START - 1, START, -1, START + 1, START, START + 2, -1]
    last = [START + 9, START + 1, START + 9, START + 9, START + 2, START + 9, START - 1]
    logits = logits_on(CPU)
    logits[5:] = torch.nan
    drawn = state_of(positions, last, CPU)
    reference.sample_and_advance(logits, drawn)
    states = [state_of(positions, last, CPU, (int(drawn.tokens[3]), 0)) for _ in range(2)]
    native.sample_and_advance(logits, states[0])
    reference.sample_and_advance(logits, states[1])
    assert_same(*states)
    assert states[0].positions.tolist() == [START, -1, -1, -1, START + 1, -1, -1]
    assert int((states[0].out_tokens != -7).sum()) == 5, "an inactive row writes nothing, every other row one token"


def test_sample_and_advance_repeats_step_by_step() -> None:
    states = [state_of([START - 1] * ROWS, [START + 2] * ROWS, CPU) for _ in range(2)]
    for _ in range(3):
        native.sample_and_advance(logits_on(CPU), states[0])
        reference.sample_and_advance(logits_on(CPU), states[1])
        assert_same(*states)


def test_output_goes_round_and_each_row_has_its_own_stop_tokens() -> None:
    states = [state_of([START + 7] * ROWS, [START + 20] * ROWS, CPU) for _ in range(2)]
    greedy = int(logits_on(CPU)[1].argmax())
    for state in states:
        state.set_stops([1, 5], [[greedy], []])
    native.sample_and_advance(logits_on(CPU), states[0])
    reference.sample_and_advance(logits_on(CPU), states[1])
    assert_same(*states)
    assert (states[0].positions == -1).tolist() == [row == 1 for row in range(ROWS)]


def test_sample_rejects_what_does_not_belong_together() -> None:
    logits, how = random(3, 80), sampling([1.0], [0.9], [(0, row, 0) for row in range(3)], CPU)
    zero, state = torch.zeros(3, dtype=torch.int64), DecodeState.of(3, 4, 80, CPU)
    refusals = {
        "logits must be contiguous": lambda: native.sample(logits.T.contiguous().T, how, zero),
        "logits must be float32, bfloat16 or float16": lambda: native.sample(logits.double(), how, zero),
        "a vocabulary of at least 1 token": lambda: native.sample(logits[:, :0].contiguous(), how, zero),
        "logits must have S for each of B = 3 rows, B·S in all with S >= 1, got 2": lambda: native.sample(
            logits[:2], how, zero[:2]
        ),
        "B·S in all with S >= 1, got 4": lambda: native.sample(logits[[0, 1, 2, 0]], how, zero[[0, 1, 2, 0]]),
        "sampling.top_p must have shape (3), got (2)": lambda: native.sample(
            logits, replace(how, top_p=how.top_p[:2]), zero
        ),
        "positions must have shape (6), got (3)": lambda: native.sample(logits.repeat(2, 1), how, zero),
        "positions must be torch.int64": lambda: native.sample(logits, how, zero.int()),
        "state.is_stop must have shape (3, 80), got (2, 80)": lambda: native.sample_and_advance(
            logits, replace(state, is_stop=state.is_stop[:2])
        ),
        "sampling must have": lambda: native.sample_and_advance(
            logits, replace(state, sampling=state.sampling.first(1))
        ),
        "must have one layout": lambda: native.sample_and_advance(
            logits, replace(state, out_tokens=state.out_tokens[:2])
        ),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)


def test_sample_takes_no_rows() -> None:
    how = rows_of(sampling([1.0], [0.9], [(0, 0, 0)], CPU), torch.zeros(0, dtype=torch.int64))
    tokens, logprobs = native.sample(torch.zeros(0, 9), how, torch.zeros(0, dtype=torch.int64))
    assert tokens.shape == logprobs.shape == (0,)
    assert_matches("sample", logprobs, logprobs)
