"""States of steps that check guesses, with everything that may happen to a row, and their comparison."""

from dataclasses import fields, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from fastllama.kernels.decode_state import NO_TOKEN, DecodeState
from fastllama.kernels.guesses import MAX_GUESSES, NO_GUESS

CPU = torch.device("cpu")
SPARE_ROWS = 2  # after a state's rows, which no op may change
SEEDS = range(150)


def random_states(seed: int) -> tuple[DecodeState, DecodeState]:
    """A random state and an equal one. Each is the first rows of a larger state, `whole` of which compares all."""
    random = Random(seed)
    n_rows, length, vocab = random.choice([1, 3, 7]), random.choice([1, 2, 9, 40]), random.choice([2, 3, 9])
    whole = DecodeState.of(n_rows + SPARE_ROWS, random.choice([1, 3, 20]), vocab, CPU).with_guesses(length)
    guesses = whole.guesses
    assert guesses is not None
    for row in range(n_rows + SPARE_ROWS):
        position = random.choice([-1, *range(length), length - 1, length - 1])
        whole.positions[row] = position
        whole.starts[row] = random.randint(0, max(position + 1, 0))
        whole.last[row] = position + random.choice([0, 1, 2, 5, 99])
        whole.tokens[row] = random.randrange(vocab)
        guesses.newest[row], guesses.matched[row] = random.randrange(length), random.randint(0, 3)
    whole.rows.copy_(torch.tensor([random.randrange(99) for _ in whole.rows]))
    generator = torch.Generator().manual_seed(seed)
    whole.is_stop.copy_(torch.rand(whole.is_stop.shape, generator=generator) < random.choice([0.0, 0.2]))
    guesses.history.copy_(torch.randint(0, vocab, guesses.history.shape, generator=generator))
    guesses.tokens.copy_(torch.randint(0, vocab, guesses.tokens.shape, generator=generator))
    guesses.tokens[torch.rand(guesses.tokens.shape, generator=generator) < random.choice([0.0, 0.1, 1.0])] = NO_GUESS
    whole.out_tokens.copy_(torch.randint(0, 99, whole.out_tokens.shape, generator=generator))
    return whole, copy_of(whole)


def copy_of(state: DecodeState) -> DecodeState:
    """A state with its own memory."""
    tensors: dict[str, Any] = {
        f.name: value.clone() for f in fields(state) if isinstance(value := getattr(state, f.name), Tensor)
    }
    assert state.guesses is not None
    return replace(state, **tensors, guesses=type(state.guesses)(*(tensor.clone() for tensor in state.guesses.tensors)))


def rows_of(whole: DecodeState) -> DecodeState:
    """The rows that ops get."""
    return whole.first(whole.rows.shape[0] - SPARE_ROWS)


def random_draws(state: DecodeState, per_row: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws (B·S,), most of which were guessed, and log-probabilities."""
    random = Random(seed)
    assert state.guesses is not None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, state.is_stop.shape[1], (state.rows.shape[0], per_row), generator=generator)
    for row, place in ((row, place) for row in range(len(drawn)) for place in range(per_row)):
        if random.random() < 0.8 and place < MAX_GUESSES:
            drawn[row, place] = state.guesses.tokens[row, place]
        if random.random() < 0.05:
            drawn[row, place] = NO_TOKEN
    logprobs = -torch.rand(drawn.shape, generator=generator)
    return drawn.flatten(), torch.where(drawn < 0, torch.nan, logprobs).flatten()


def assert_same_states(ours: DecodeState, expected: DecodeState) -> None:
    """Assert that all tensors are equal bit for bit."""
    assert ours.guesses is not None and expected.guesses is not None
    for field in fields(ours):
        if isinstance(value := getattr(ours, field.name), Tensor):
            assert_same(value, getattr(expected, field.name), field.name)
    for name, value, other in zip(
        ("history", "tokens", "matched", "newest"), ours.guesses.tensors, expected.guesses.tensors, strict=True
    ):
        assert_same(value, other, f"guesses.{name}")


def assert_same(ours: Tensor, expected: Tensor, name: str) -> None:
    """Assert that two tensors are equal, NaN included."""
    equal = (ours == expected) | (ours != ours) & (expected != expected)
    assert ours.shape == expected.shape and ours.dtype == expected.dtype and bool(equal.all()), (
        f"{name}: {ours.tolist()}, expected {expected.tolist()}"
    )
