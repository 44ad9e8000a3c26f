"""Native ops of a step that checks guesses: they leave what the plain operations of torch leave, in any state."""

from dataclasses import replace

import pytest
import torch

from fastllama.kernels import checking, native
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.guesses import DRAFTED, MAX_GUESSES, NO_GUESS
from tests.kernels.native.checking_cases import (
    CPU,
    SEEDS,
    assert_same,
    assert_same_states,
    random_draws,
    random_states,
    rows_of,
)

WINDOWS = [(0, 1), (0, 2), (0, 5), (0, 16), (1, 3), (3, 16), (15, 16), (-1, 1), (-3, 0), (-9, -2), (-16, 16)]

pytestmark = pytest.mark.usefixtures("isa", "threads")


def state_after(tokens: list[int], guesses: list[int], last: int = 99) -> DecodeState:
    """One row whose newest token is the last of these, with room for 20 tokens."""
    state = DecodeState.of(1, 8, 10, CPU).with_guesses(20)
    state.start_rows([0], tokens[-1:], [len(tokens) - 1], [len(tokens)], [last])
    assert state.guesses is not None
    state.guesses.history[0, : len(tokens)] = torch.tensor(tokens)
    state.guesses.tokens[0, : len(guesses)] = torch.tensor(guesses)
    return state


def guessed(state: DecodeState) -> list[int]:
    """The guesses of the only row."""
    assert state.guesses is not None
    values: list[int] = state.guesses.tokens[0].tolist()
    return values


def test_window_is_that_of_torch() -> None:
    kinds = set()
    for seed in SEEDS:
        ours, expected = random_states(seed)
        begin, end = WINDOWS[seed % len(WINDOWS)]
        windows = native.window(rows_of(ours), begin, end), checking.window(rows_of(expected), begin, end)
        for name, one, other in zip(windows[0]._fields, *windows, strict=True):
            assert_same(one, other, name)
        assert_same_states(ours, expected)
        kinds |= {(int(at) >= 0, begin >= 1, end >= 1) for at in windows[0].positions}
    assert len(kinds) == 6, "tokens of all kinds are live in some window, and inactive in another"


def test_window_has_the_newest_token_and_the_guesses_up_to_the_last_position() -> None:
    state = state_after([5, 6, 7], [8, 9, NO_GUESS, 4], last=6)
    window = native.window(state, -1, 5)
    assert window.tokens.tolist() == [6, 7, 8, 9, 0, 0]
    assert window.positions.tolist() == [1, 2, 3, 4, -1, -1] and window.following.tolist() == [2, 3, 4, 5, 0, 0]
    state.last[0] = 4
    assert native.window(state, 0, 3).positions.tolist() == [2, 3, -1]


def test_accept_is_that_of_torch() -> None:
    advances, ended = set(), 0
    for seed in SEEDS:
        ours, expected = random_states(seed)
        before = rows_of(ours).positions.clone()
        drawn, logprobs = random_draws(rows_of(ours), 1 + seed % 16, seed)
        native.accept(rows_of(ours), drawn, logprobs)
        checking.accept(rows_of(expected), drawn, logprobs)
        assert_same_states(ours, expected)
        after = rows_of(ours)
        assert after.guesses is not None
        advances |= set((after.guesses.newest - before)[before >= 0].tolist())
        ended += int(((before >= 0) & (after.positions < 0)).sum())
    assert {1, 2, 3, 4, 5} <= advances and max(advances) > 8 and ended > 20


def test_accept_ends_at_a_stop_token_within_the_guesses() -> None:
    state = state_after([5, 6], [7, 8, 9])
    state.set_stops([0], [[8]])
    native.accept(state, torch.tensor([7, 8, 9, 1]), torch.tensor([-0.5, -0.25, -9.0, -9.0]))
    assert state.guesses is not None and state.positions.tolist() == [-1] and state.guesses.newest.tolist() == [3]
    assert state.out_tokens[:3, 0].tolist() == [7, 8, 0] and state.out_logprobs[:3, 0].tolist() == [-0.5, -0.25, 0]
    assert state.guesses.history[0, :5].tolist() == [5, 6, 7, 8, 0] and state.tokens.tolist() == [8]


def test_look_up_is_that_of_torch() -> None:
    matched = set()
    for seed in SEEDS:
        ours, expected = random_states(seed)
        n_guesses = (1, 2, 3, 7, MAX_GUESSES, 0)[seed % 6]
        native.look_up(rows_of(ours), n_guesses)
        checking.look_up(rows_of(expected), n_guesses)
        assert_same_states(ours, expected)
        after = rows_of(ours).guesses
        assert after is not None
        matched |= set(after.matched.tolist())
    assert matched == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("tokens", "guesses", "matched"),
    [
        ([1, 2, 3, 4, 1, 2, 3], [4, 1, 2, 3, 4], 3),
        ([1, 2, 3, 7, 8, 2, 3, 9, 1, 2, 3], [7, 8, 2, 3, 9], 3),  # not the later two tokens
        ([2, 3, 7, 2, 3, 8, 4, 3, 9, 2, 3], [8, 4, 3, 9, 2], 2),  # the later of two places, not the later one token
        ([3, 9, 8, 3], [9, 8, 3, 9, 8], 1),  # the very beginning; what followed goes round
        ([3, 3], [3, 3, 3, 3, 3], 1),
        ([1, 2, 3], [NO_GUESS] * 5, 0),
        ([4], [NO_GUESS] * 5, 0),
    ],
)
def test_look_up_guesses_what_followed_the_longest_then_latest_place(
    tokens: list[int], guesses: list[int], matched: int
) -> None:
    state = state_after(tokens, [9] * MAX_GUESSES)
    native.look_up(state, 5)
    assert state.guesses is not None
    assert guessed(state) == [*guesses, *[9] * (MAX_GUESSES - 5)] and state.guesses.matched.tolist() == [matched]


def test_put_guess_is_that_of_torch() -> None:
    matched = set()
    for seed in SEEDS:
        ours, expected = random_states(seed)
        n_rows, size = rows_of(ours).rows.shape[0], 1 + seed % 2
        vocab = rows_of(ours).is_stop.shape[1]
        drawn = torch.randint(-1, vocab + 1, (n_rows * size,), generator=torch.Generator().manual_seed(seed))
        for number in (seed % MAX_GUESSES, 0, 1):
            native.put_guess(rows_of(ours), number, drawn)
            checking.put_guess(rows_of(expected), number, drawn)
            assert_same_states(ours, expected)
        after = rows_of(ours).guesses
        assert after is not None
        matched |= set(after.matched.tolist())
    assert {0, DRAFTED} <= matched


def test_ops_take_no_rows() -> None:
    state = state_after([1, 2], [3]).first(0)
    assert native.window(state, 0, 3).tokens.shape == (0,)
    native.accept(state, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    native.look_up(state, 3)
    native.put_guess(state, 0, torch.zeros(0, dtype=torch.int64))


def test_ops_reject_what_does_not_belong_together() -> None:
    state = state_after([1, 2], [3])
    guesses = state.guesses
    assert guesses is not None
    drawn, logprobs = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    two = DecodeState.of(2, 8, 10, CPU).with_guesses(20)
    assert two.guesses is not None
    other = two.guesses
    refusals = {
        "this decode state has no guesses": lambda: native.window(replace(state, guesses=None), 0, 2),
        "begin < end <= 16, got begin 0 and end 17": lambda: native.window(state, 0, 17),
        "begin < end <= 16, got begin 2 and end 2": lambda: native.window(state, 2, 2),
        "state.positions must be torch.int64": lambda: native.look_up(replace(state, positions=drawn[:1].int()), 2),
        "guesses.history must have shape (1, T), got (2, 20)": lambda: native.window(
            replace(state, guesses=replace(guesses, history=other.history)), 0, 2
        ),
        "guesses.tokens must have shape (1, 15), got (1, 14)": lambda: native.look_up(
            replace(state, guesses=replace(guesses, tokens=guesses.tokens[:, :14])), 2
        ),
        "guesses.history must have at least 1 position": lambda: native.look_up(
            replace(state, guesses=replace(guesses, history=guesses.history[:, :0])), 2
        ),
        "0 to 15 guesses, got 16": lambda: native.look_up(state, 16),
        "1 to 15 guesses, got number 15": lambda: native.put_guess(state, 15, drawn[:1]),
        "drawn must have S for each of B = 2 rows, B·S in all with S >= 1, got 3": lambda: native.accept(
            two, torch.zeros(3, dtype=torch.int64), torch.zeros(3)
        ),
        "at most 16 tokens a row, got 17": lambda: native.accept(
            state, torch.zeros(17, dtype=torch.int64), torch.zeros(17)
        ),
        "logprobs must be torch.float32": lambda: native.accept(state, drawn, logprobs.double()),
        "must have one layout": lambda: native.accept(replace(state, out_tokens=two.out_tokens), drawn, logprobs),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
