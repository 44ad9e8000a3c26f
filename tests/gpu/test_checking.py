"""The kernels of a step that checks guesses on a GPU: long histories, and capture in a CUDA graph."""

import pytest
import torch

from fastllama.kernels import checking, fused
from fastllama.kernels.decode_state import DecodeState
from tests.kernels.test_checking import ROWS, assert_same, state_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]
DEVICE, LENGTH, SIZE = torch.device("cuda"), 131072, 4


def test_look_up_matches_reference_in_long_histories() -> None:
    states = [DecodeState.of(ROWS, 4, 300, DEVICE).with_guesses(LENGTH) for _ in range(2)]
    history = torch.randint(300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for state in states:
        assert state.guesses is not None
        state.guesses.history.copy_(history)
        state.positions.copy_(torch.arange(1, ROWS + 1, device=DEVICE) * (LENGTH // ROWS) - 1)
    fused.look_up(states[0], 15)
    checking.look_up(states[1], 15)
    assert_same(*states)


def test_the_ops_replay_like_eager() -> None:
    states = [state_of(3, DEVICE) for _ in range(2)]
    drawn, scores = torch.ones(ROWS * SIZE, dtype=torch.int64, device=DEVICE), torch.zeros(ROWS * SIZE, device=DEVICE)
    warm = state_of(4, DEVICE)
    for state in (warm, warm):
        fused.window(state, 0, SIZE)
        fused.accept(state, drawn, scores)
        fused.look_up(state, SIZE - 1)
        fused.put_guess(state, 1, drawn)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused.window(states[0], 0, SIZE)
        fused.accept(states[0], drawn, scores)
        fused.look_up(states[0], SIZE - 1)
        fused.put_guess(states[0], 1, drawn)
    for _ in range(3):
        graph.replay()
        expected = checking.window(states[1], 0, SIZE)
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
        checking.accept(states[1], drawn, scores)
        checking.look_up(states[1], SIZE - 1)
        checking.put_guess(states[1], 1, drawn)
        assert_same(*states)
