"""The end of a decode step: the draw kernel advances rows as the reference does."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from fastllama.kernels import fused, reference
from fastllama.kernels.decode_state import INACTIVE, NO_TOKEN, DecodeState
from fastllama.kernels.sampling.sample import sample_and_advance
from fastllama.kernels.sampling.scratch import SamplingScratch
from tests.kernels.cases import random
from tests.kernels.sampling.draws import sampling

ROWS, STEPS, VOCABULARY = 7, 5, 300
START = 20  # of every row
TEMPERATURES = [1.0, 0.0, 0.8, 1.2, 1.0, 0.0, 1.0]


def state_of(positions: list[int], last: list[int], device: torch.device, stops: tuple[int, ...] = ()) -> DecodeState:
    """The first rows of a larger state, so that outputs of successive steps are not adjacent."""
    state = DecodeState.of(ROWS + 2, STEPS, VOCABULARY, device).first(ROWS)
    streams = [(2**63 + row, row, 3) for row in range(ROWS)]
    state.set([1] * ROWS, [START - 1] * ROWS, last, stops, sampling(TEMPERATURES, [0.9], streams, device))
    state.positions.copy_(torch.tensor(positions))
    state.out_tokens.fill_(-7)
    return state


def logits_on(device: torch.device) -> Tensor:
    return random(ROWS, VOCABULARY, seed=3).mul(2).to(torch.bfloat16).to(device)


def assert_same(ours: DecodeState, expected: DecodeState) -> None:
    for name in (field.name for field in fields(DecodeState) if field.name != "sampling"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), atol=1e-5, rtol=1e-5, equal_nan=True)


def test_sample_and_advance_matches_reference(device: torch.device) -> None:
    """Rows that continue, are inactive, reach their last position or a stop token, or have NaN logits."""
    positions = [START - 1, START, INACTIVE, START + 1, START, START + 2, INACTIVE]
    last = [START + 9, START + 1, START + 9, START + 9, START + 2, START + 9, START - 1]
    logits = logits_on(device)
    logits[5] = torch.nan
    logits[6] = torch.nan
    # First find out what row 3 draws, to make it a stop token.
    drawn = state_of(positions, last, device)
    reference.sample_and_advance(logits, drawn)
    stop = int(drawn.tokens[3])
    states = [state_of(positions, last, device, (stop, 0)) for _ in range(2)]
    scratch = SamplingScratch.of(ROWS, VOCABULARY, device)
    sample_and_advance(logits, states[0], scratch)
    reference.sample_and_advance(logits, states[1])
    assert_same(*states)
    ours = states[0]
    assert ours.positions.tolist() == [START, INACTIVE, INACTIVE, INACTIVE, START + 1, INACTIVE, INACTIVE]
    assert ours.out_tokens[3, 5] == NO_TOKEN and bool(ours.out_logprobs[3, 5].isnan())
    assert ours.out_tokens[2, 3] == stop and ours.out_tokens[0, 0] == ours.tokens[0]
    assert int((ours.out_tokens != -7).sum()) == 5, "an inactive row writes nothing, every other row one token"
    assert not scratch.counters.any()


def test_sample_and_advance_matches_reference_over_several_steps(device: torch.device) -> None:
    """Several steps through the backends' ops; the random number changes with the position."""
    states = [state_of([START - 1] * ROWS, [START + 2] * ROWS, device) for _ in range(2)]
    workspace = fused.workspace(
        max_batch_size=ROWS, n_heads=2, n_kv_heads=1, head_dim=16, vocab_size=VOCABULARY, device=device
    )
    for _ in range(3):
        fused.sample_and_advance(logits_on(device), states[0], workspace)
        reference.sample_and_advance(logits_on(device), states[1])
        assert_same(*states)
    assert states[0].positions.tolist() == [INACTIVE] * ROWS
    same = states[0].out_tokens[0] == states[0].out_tokens[1]
    assert bool(same[1] & same[5]) and not bool(same.all()), "equal logits: greedy rows repeat their token, others draw"


def test_output_goes_round_and_each_row_has_its_own_stop_tokens(device: torch.device) -> None:
    """The steps beyond the output's size begin at its front. A token stops only the rows that it is a stop token of."""
    position = START + 2 * STEPS
    states = [state_of([position] * ROWS, [position + 9] * ROWS, device) for _ in range(2)]
    greedy = int(logits_on(device)[1].argmax())
    for state in states:
        state.set_stops([1, 5], [[greedy], []])
    sample_and_advance(logits_on(device), states[0], SamplingScratch.of(ROWS, VOCABULARY, device))
    reference.sample_and_advance(logits_on(device), states[1])
    assert_same(*states)
    assert (states[0].out_tokens[1] != -7).all() and (states[0].out_tokens[[0, 2, 3, 4]] == -7).all()
    assert states[0].positions[1] == INACTIVE and (states[0].positions != INACTIVE).sum() == ROWS - 1


def test_sample_and_advance_rejects_a_state_of_other_shapes(device: torch.device) -> None:
    scratch = SamplingScratch.of(ROWS, VOCABULARY, device)
    state = state_of([START] * ROWS, [START + 9] * ROWS, device)
    with pytest.raises(ValueError, match=r"sampling.temperature must have shape \(3\), got \(7\)"):
        sample_and_advance(logits_on(device)[:3], state, scratch)
    with pytest.raises(ValueError, match=r"sampling.temperature must have shape \(7\), got \(1\)"):
        sample_and_advance(logits_on(device), replace(state, sampling=state.sampling.first(1)), scratch)
    with pytest.raises(ValueError, match=r"state.is_stop must have shape \(7, 300\), got \(6, 300\)"):
        sample_and_advance(logits_on(device), replace(state, is_stop=state.is_stop[:6]), scratch)
    with pytest.raises(ValueError, match="must have one layout: make it with DecodeState.of"):
        sample_and_advance(logits_on(device), replace(state, out_tokens=state.out_tokens[:2]), scratch)
