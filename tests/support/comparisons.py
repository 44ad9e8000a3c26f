"""Answers of two paths compared: tokens to the last, floats within the one table's tolerance.

Two paths sum in another order, on another processor in yet another. So floats are never compared exactly, and never
after rounding, which only moves the places where they part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllama.benchmarks.tolerances import assert_matches

Tokens = Sequence[Sequence[int]]
Logprobs = Sequence[Sequence[float]]


def assert_same_answers(ours: tuple[Tokens, Logprobs | None], expected: tuple[Tokens, Logprobs | None]) -> None:
    """What two calls of `generate` returned."""
    assert ours[0] == expected[0]
    if expected[1] is None:
        assert ours[1] is None
    else:
        assert_same_logprobs(ours[1], expected[1])


def assert_same_logprobs(ours: Logprobs | None, expected: Logprobs | None, what: str = "logprobs") -> None:
    """float32 log-probabilities, row by row. what: their row of the table."""
    assert ours is not None and expected is not None
    for mine, theirs in zip(ours, expected, strict=True):
        assert_matches(what, torch.tensor(mine), torch.tensor(theirs))


def assert_same_logits(ours: Tensor, expected: Tensor) -> None:
    """In the dtype of ours."""
    assert_matches("logits", ours, expected)
