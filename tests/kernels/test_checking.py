"""The kernels of a step that checks guesses equal the plain-torch ops."""

from dataclasses import fields

import pytest
import torch

from fastllama.kernels import checking, checking_triton
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.guesses import DRAFTED

ROWS, LENGTH, VOCABULARY, STEPS = 6, 40, 4, 20


def state_of(seed: int, device: torch.device) -> DecodeState:
    """The first rows of a larger state, with random tokens, guesses, stops and last positions."""
    random = torch.Generator().manual_seed(seed)

    def numbers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random).to(device)

    state = DecodeState.of(ROWS + 2, STEPS, VOCABULARY, device).with_guesses(LENGTH).first(ROWS)
    assert state.guesses is not None
    state.guesses.history.copy_(numbers(0, VOCABULARY, ROWS, LENGTH))
    state.guesses.tokens.copy_(numbers(-1, VOCABULARY, *state.guesses.tokens.shape))
    state.positions.copy_(numbers(-1, LENGTH - 17, ROWS))
    state.starts.copy_((state.positions - numbers(0, 5, ROWS)).clamp(min=0))
    state.last.copy_(state.positions + numbers(1, 18, ROWS))
    state.is_stop.copy_(numbers(0, 8, ROWS, VOCABULARY) == 0)
    return state


def assert_same(ours: DecodeState, expected: DecodeState) -> None:
    assert ours.guesses is not None and expected.guesses is not None
    for name in ("tokens", "positions", "out_tokens", "out_logprobs"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    for field in fields(ours.guesses):
        assert torch.equal(getattr(ours.guesses, field.name), getattr(expected.guesses, field.name)), field.name


@pytest.mark.parametrize("seed", range(4))
def test_window_matches_reference(seed: int, device: torch.device) -> None:
    for begin, end in ((0, 1), (0, 4), (0, 16), (-1, 1), (-1, 3), (2, 5)):
        ours = checking_triton.window(state_of(seed, device), begin, end)
        for one, other in zip(ours, checking.window(state_of(seed, device), begin, end), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_accept_matches_reference(size: int, device: torch.device) -> None:
    for seed in range(6):
        states = [state_of(seed, device) for _ in range(2)]
        assert states[0].guesses is not None
        drawn = states[0].guesses.tokens[:, [*range(size - 1), 0]].clone()  # guesses that are right, up to a change
        drawn[::2, seed % size] = seed % 5 - 1
        scores = torch.randn(ROWS * size, generator=torch.Generator().manual_seed(seed)).to(device)
        checking_triton.accept(states[0], drawn.flatten(), scores)
        checking.accept(states[1], drawn.flatten(), scores)
        assert_same(*states)


@pytest.mark.parametrize("n_guesses", [1, 4, 15])
def test_look_up_matches_reference(n_guesses: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking_triton, "BLOCK_T", 8)
    for seed in range(8):
        states = [state_of(seed, device) for _ in range(2)]
        checking_triton.look_up(states[0], n_guesses)
        checking.look_up(states[1], n_guesses)
        assert_same(*states)


def test_accept_passes_on_scores_that_are_not_numbers(device: torch.device) -> None:
    """A row whose logits are not numbers has token -1 and a score of NaN."""
    states = [state_of(1, device) for _ in range(2)]
    drawn, scores = torch.full((ROWS * 2,), -1, device=device), torch.full((ROWS * 2,), float("nan"), device=device)
    checking_triton.accept(states[0], drawn, scores)
    checking.accept(states[1], drawn, scores)
    for state in states:
        assert (state.out_tokens == -1).any() and torch.equal(state.out_tokens == -1, state.out_logprobs.isnan())
        state.out_logprobs.nan_to_num_(nan=1.0)
    assert_same(*states)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("number", [0, 1, 7, 14])
def test_put_guess_matches_reference(number: int, size: int, device: torch.device) -> None:
    for seed in range(4):
        states = [state_of(seed, device) for _ in range(2)]
        drawn = torch.randint(-1, VOCABULARY + 1, (ROWS * size,), generator=torch.Generator().manual_seed(seed))
        checking_triton.put_guess(states[0], number, drawn.to(device))
        checking.put_guess(states[1], number, drawn.to(device))
        assert_same(*states)


def test_reference_puts_the_last_draw_of_each_row(device: torch.device) -> None:
    state = DecodeState.of(4, STEPS, VOCABULARY, device).with_guesses(LENGTH)
    assert state.guesses is not None
    state.guesses.tokens.fill_(1)
    checking.put_guess(state, 0, torch.tensor([0, 3, 3, VOCABULARY, 0, -1, 0, 2], device=device))
    checking.put_guess(state, 1, torch.tensor([3, 3, 3, VOCABULARY], device=device))
    assert state.guesses.tokens[:, :3].tolist() == [[3, 3, -1], [-1, -1, -1], [-1, -1, -1], [2, -1, -1]]
    assert state.guesses.matched.tolist() == [DRAFTED, 0, 0, DRAFTED]


@pytest.mark.parametrize("seed", range(3))
def test_reference_accepts_like_single_steps(seed: int, device: torch.device) -> None:
    """A loop over tokens, in Python numbers."""
    state, size = state_of(seed, device), 4
    assert state.guesses is not None
    before, guesses = state.positions.tolist(), state.guesses.tokens.tolist()
    drawn = [[*guesses[row][: size - 1], 1] for row in range(ROWS)]
    drawn[seed][1] = 2
    checking.accept(state, torch.tensor(drawn, device=device).flatten(), torch.zeros(ROWS * size, device=device))
    for row, position in enumerate(before):
        for i in range(size if position >= 0 else 0):
            token, position = drawn[row][i], position + 1
            known = max(token, 0)
            assert int(state.out_tokens[(position - int(state.starts[row])) % STEPS, row]) == token
            assert int(state.guesses.history[row, position]) == known and int(state.guesses.newest[row]) >= position
            if token < 0 or bool(state.is_stop[row, known]) or position >= int(state.last[row]):
                position = -1
                break
            if token != guesses[row][i]:
                break
        assert int(state.positions[row]) == position


@pytest.mark.parametrize("seed", range(3))
def test_reference_looks_up_like_a_loop(seed: int, device: torch.device) -> None:
    state = state_of(seed, device)
    assert state.guesses is not None
    checking.look_up(state, 3)
    for row, newest in enumerate(state.positions.tolist()):
        text = state.guesses.history[row, : newest + 1].tolist()
        matched, expected = 0, [-1] * 3
        for n in (3, 2, 1):
            ends = [end for end in range(n - 1, newest) if text[end - n + 1 : end + 1] == text[newest - n + 1 :]]
            if ends and newest >= n - 1:
                end = ends[-1]
                matched, expected = n, [text[end + 1 + i % (newest - end)] for i in range(3)]
                break
        assert int(state.guesses.matched[row]) == matched
        assert state.guesses.tokens[row, :3].tolist() == expected
