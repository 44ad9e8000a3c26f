"""Compares the results of two code paths: tokens exactly, floats within the tolerances of one table.

The order of sums differs between code paths and between processors. So floats are never compared exactly, and never
after rounding: two close values can still round differently.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllama.benchmarks.tolerances import assert_matches

Tokens = Sequence[Sequence[int]]
Logprobs = Sequence[Sequence[float]]


def assert_same_answers(ours: tuple[Tokens, Logprobs | None], expected: tuple[Tokens, Logprobs | None]) -> None:
    """Assert equal results of two `generate` calls."""
    assert ours[0] == expected[0]
    if expected[1] is None:
        assert ours[1] is None
    else:
        assert_same_logprobs(ours[1], expected[1])


def assert_same_logprobs(ours: Logprobs | None, expected: Logprobs | None, what: str = "logprobs") -> None:
    """Assert equal float32 log-probabilities. what: the tolerance table's entry."""
    assert ours is not None and expected is not None
    for row, expected_row in zip(ours, expected, strict=True):
        assert_matches(what, torch.tensor(row), torch.tensor(expected_row))


def assert_same_logits(ours: Tensor, expected: Tensor) -> None:
    """Assert equal logits, with the tolerance for the dtype of `ours`."""
    assert_matches("logits", ours, expected)
