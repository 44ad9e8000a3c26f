"""Controls of the logits, against loops over plain numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.sampling.controls import MAX_TOP_TOKENS, LogitControls, RowControls, TopTokens
from fastllama.kernels.sampling.extras import controlled, sample_with_extras

VOCABULARY = 37
CPU = torch.device("cpu")
STOPS = (4, 9)
PROMPT_LENGTH = 3

CASES: dict[str, RowControls] = {
    "none": RowControls(),
    "repetition": RowControls(repetition=1.7, prompt=(1, 2, 2), generated=(5, 5, 6)),
    "repetition-below-1": RowControls(repetition=0.4, prompt=(30,), generated=(31, 5)),
    "presence": RowControls(presence=1.5, prompt=(1, 2), generated=(5, 5, 6)),
    "presence-negative": RowControls(presence=-2.0, generated=(7,)),
    "frequency": RowControls(frequency=0.7, prompt=(1, 2), generated=(5, 5, 5, 6)),
    "bias": RowControls(bias={3: 4.5, 36: -100.0, 0: 100.0}),
    "min-tokens-not-reached": RowControls(min_position=PROMPT_LENGTH + 5),
    "min-tokens-reached": RowControls(min_position=PROMPT_LENGTH + 3),
    "min-p": RowControls(min_p=0.2),
    "min-p-1": RowControls(min_p=1.0),
    "top-k": RowControls(top_k=5),
    "top-k-1": RowControls(top_k=1),
    "top-k-larger-than-the-vocabulary": RowControls(top_k=1000),
    "all": RowControls(1.3, 0.5, 0.25, 0.05, 12, PROMPT_LENGTH + 9, {2: 3.0, 8: -1.0}, (1, 2, 3), (5, 5, 8)),
}
NEWEST = 6  # the newest token, the third that was generated
TEMPERATURE = 0.8


def by_hand(logits: list[float], controls: RowControls, newest: int, position: int, temperature: float) -> list[float]:
    """The definition, token by token."""
    generated = [*controls.generated, newest] if position >= PROMPT_LENGTH else []
    x: list[float] = []
    for token, logit in enumerate(logits):
        if token in controls.prompt or token in generated:
            logit = logit / controls.repetition if logit > 0 else logit * controls.repetition
        count = generated.count(token)
        logit -= controls.presence * (count > 0) + controls.frequency * count
        logit += controls.bias.get(token, 0.0)
        if token in STOPS and position + 1 < controls.min_position:
            logit = -math.inf
        x.append(logit)
    best = max(x)
    kept = sorted(x, reverse=True)[: controls.top_k or None]
    nearest = best + temperature * math.log(controls.min_p) if controls.min_p else -math.inf
    return [logit if logit >= max(kept[-1], nearest) else -math.inf for logit in x]


def state_of(rows: list[RowControls], temperature: float = TEMPERATURE) -> DecodeState:
    """Rows that have generated two tokens and NEWEST."""
    n_rows = len(rows)
    state = DecodeState.of(n_rows, 4, VOCABULARY, CPU).with_extras()
    position = PROMPT_LENGTH + 2
    starts = [PROMPT_LENGTH] * n_rows
    state.start_rows(range(n_rows), [NEWEST] * n_rows, [position] * n_rows, starts, [99] * n_rows)
    state.set_stops(range(n_rows), [STOPS] * n_rows)
    streams = [(row, 0, 0) for row in range(n_rows)]
    state.sampling.set_rows(state.rows, SamplingTensors.of(temperature, 1.0, streams, CPU))
    assert state.controls is not None
    for row, controls in enumerate(rows):
        state.controls.set_row(row, RowControls(9.0, 1.0, 1.0, 0.5, 3, 50, {1: 1.0}, (1,), (2,)))  # of another request
        state.controls.set_row(row, controls)
    return state


def logits_for(n_rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(n_rows, VOCABULARY, generator=torch.Generator().manual_seed(3))).to(dtype)


@pytest.mark.parametrize("temperature", [0.0, TEMPERATURE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_controlled_is_the_definition(dtype: torch.dtype, temperature: float) -> None:
    """All cases as rows of one batch: a row's controls do not reach another row."""
    rows = list(CASES.values())
    state, logits = state_of(rows, temperature), logits_for(len(rows), dtype)
    assert state.controls is not None
    ours = controlled(logits, state, state.controls)
    assert ours.dtype == torch.float32
    position = PROMPT_LENGTH + 2
    for row, controls in enumerate(rows):
        expected = torch.tensor(by_hand(logits[row].tolist(), controls, NEWEST, position, temperature))
        assert torch.equal(ours[row].isinf(), expected.isinf()), list(CASES)[row]
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours[row].float(), expected, atol=tolerance, rtol=tolerance)


def test_neutral_controls_change_no_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state, logits = state_of([RowControls()] * 3), logits_for(3, dtype)
        assert state.controls is not None
        assert torch.equal(controlled(logits, state, state.controls), logits)


def test_tokens_are_counted_when_they_are_fed() -> None:
    """The prompt's last token is not counted, generated ones are, step after step."""
    state = state_of([RowControls(frequency=1.0)])
    assert state.controls is not None
    state.start_rows([0], [20], [PROMPT_LENGTH - 1], [PROMPT_LENGTH], [99])
    counts: list[int] = []
    for token, position in (
        (20, PROMPT_LENGTH - 1),
        (7, PROMPT_LENGTH),
        (7, PROMPT_LENGTH + 1),
        (8, PROMPT_LENGTH + 2),
    ):
        state.tokens[0], state.positions[0] = token, position
        controlled(logits_for(1), state, state.controls)
        counts.append(int(state.controls.counts[0].sum()))
    assert counts == [0, 1, 2, 3]
    assert state.controls.counts[0, [7, 8, 20]].tolist() == [2, 1, 0]


def test_an_inactive_row_counts_nothing() -> None:
    state = state_of([RowControls(), RowControls()])
    assert state.controls is not None
    state.stop_rows([1])
    controlled(logits_for(2), state, state.controls)
    assert state.controls.counts.sum(-1).tolist() == [1, 0]


def test_ties_at_the_threshold_of_top_k_stay() -> None:
    state = state_of([RowControls(top_k=2)])
    assert state.controls is not None
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 5] = 1.0
    assert not controlled(logits, state, state.controls).isinf().any()


def test_min_p_is_a_share_of_the_probability_after_temperature() -> None:
    for temperature in (0.3, 1.0, 2.5):
        state, logits = state_of([RowControls(min_p=0.1)], temperature), logits_for(1)
        assert state.controls is not None
        probabilities = torch.softmax(logits[0] / temperature, -1)
        expected = probabilities >= 0.1 * probabilities.max()
        assert torch.equal(~controlled(logits, state, state.controls)[0].isinf(), expected)


def test_repetition_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    controls = RowControls(repetition=1.6, prompt=(1, 2, 2, 30), generated=(11, 12))
    state, logits = state_of([controls]), logits_for(1)
    assert state.controls is not None
    seen = torch.tensor([[*controls.prompt, *controls.generated, NEWEST]])
    expected = RepetitionPenaltyLogitsProcessor(1.6)(seen, logits.clone())
    torch.testing.assert_close(controlled(logits, state, state.controls), expected)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_step_with_controls_draws_from_them_and_scores_without(greedy: bool) -> None:
    rows = list(CASES.values())
    state, logits = state_of(rows, 0.0 if greedy else 1.0), logits_for(len(rows))
    other = state_of(rows, 0.0 if greedy else 1.0)
    assert state.controls is not None and other.controls is not None
    sample_with_extras(reference, logits, state, None, controls=state.controls)
    changed = controlled(logits, other, other.controls)
    tokens, _ = reference.sample(changed, other.sampling, other.positions + 1)
    at = (state.positions.clamp(min=0).max() - PROMPT_LENGTH) % 4
    out_tokens, out_logprobs = state.out_tokens[at], state.out_logprobs[at]
    assert out_tokens.tolist() == tokens.tolist()
    expected = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(out_logprobs, expected, atol=1e-5, rtol=1e-5)


def test_the_likeliest_tokens_are_those_of_the_model() -> None:
    state, logits = state_of([RowControls(bias={3: 50.0})] * 2, 0.0), logits_for(2)
    state.stop_rows([1])
    assert state.top is not None and state.controls is not None
    sample_with_extras(reference, logits, state, None, controls=state.controls, top=state.top)
    expected = torch.log_softmax(logits[0], -1).topk(MAX_TOP_TOKENS)
    step = 3  # the third new token is written after the second
    assert state.out_tokens[step % 4, 0] == 3
    assert state.top.ids[step % 4, 0].tolist() == expected.indices.tolist()
    torch.testing.assert_close(state.top.logprobs[step % 4, 0], expected.values)
    assert not state.top.ids[:, 1].any(), "a row that is inactive writes nothing"


def test_logits_that_are_not_numbers_give_no_token() -> None:
    rows = [RowControls(top_k=3, repetition=1.2)] * 2
    state, logits = state_of(rows), logits_for(2)
    logits[0, 4] = torch.nan
    assert state.controls is not None
    sample_with_extras(reference, logits, state, None, controls=state.controls, top=state.top)
    tokens = state.out_tokens[3]
    assert tokens[0] == -1 and tokens[1] >= 0 and state.positions.tolist()[0] == -1


def test_first_rows_share_memory() -> None:
    controls, top = LogitControls.of(3, VOCABULARY, CPU), TopTokens.of(2, 3, VOCABULARY, CPU)
    controls.first(2).counts[1, 5] = 7
    top.first(1).ids[1, 0, 0] = 9
    assert controls.counts[1, 5] == 7 and top.ids[1, 0, 0] == 9
    assert TopTokens.of(1, 1, 5, CPU).ids.shape == (1, 1, 5), "a small vocabulary has fewer tokens"
    values: dict[str, Any] = {
        name: getattr(controls.first(2), name).shape[0] for name in ("bias", "top_k", "in_prompt")
    }
    assert set(values.values()) == {2}


def test_small_penalties_do_not_vanish_in_16_bits() -> None:
    """bfloat16 logits near 20 lie 0.125 apart."""
    state = DecodeState.of(1, 4, VOCABULARY, CPU)
    state.start_rows([0], [1], [PROMPT_LENGTH], [PROMPT_LENGTH + 1], [90])
    controls = LogitControls.of(1, VOCABULARY, CPU)
    controls.set_row(0, RowControls(bias={5: -0.05}))
    logits = torch.full((1, VOCABULARY), 20.25, dtype=torch.bfloat16)
    found = controlled(logits, state, controls)
    assert found.dtype == torch.float32 and found[0, 5] < found[0, 6]
    reference.sample_and_advance(found, state)
    assert state.tokens[0] == 0
