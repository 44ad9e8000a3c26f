"""Comparing two runs: tokens, log-probabilities, ties."""

import math

import pytest
import torch

from fastllama.benchmarks.peers.agreement import compare
from fastllama.benchmarks.runners import Run


def run_of(tokens: list[list[int]], logprob: float = -1.0, margin: float = 1.0) -> Run:
    return Run(tokens, [], [[logprob] * len(row) for row in tokens], [[margin] * len(row) for row in tokens])


def test_compare_agrees_within_the_tolerance() -> None:
    found = compare(run_of([[1, 2], [3, 4]]), run_of([[1, 2], [3, 4]], logprob=-1.00005), torch.float32)
    assert (found.agrees, found.tokens_compared, found.tokens_total) == (True, 4, 4)
    assert found.max_logprob_difference == pytest.approx(5e-5)


@pytest.mark.parametrize("logprob", [-1.001, float("nan")])
def test_compare_names_log_probabilities_that_differ(logprob: float) -> None:
    found = compare(run_of([[1, 2]]), run_of([[1, 2]], logprob=logprob), torch.float32)
    assert not found.agrees and "row 0 step 0: log-probabilities" in str(found.difference)


def test_compare_names_tokens_that_differ() -> None:
    found = compare(run_of([[1, 2], [3, 9, 5]]), run_of([[1, 2], [3, 4, 5]]), torch.float32)
    assert not found.agrees and "row 1 step 1: our token 9, the peer's 4" in str(found.difference)


def test_compare_accepts_different_tokens_only_at_a_tie() -> None:
    ours, tied, clear = run_of([[1, 9, 9]]), run_of([[1, 2, 3]], margin=5e-5), run_of([[1, 2, 3]], margin=2e-4)
    assert compare(ours, tied, torch.float32).agrees
    assert compare(ours, tied, torch.float32).tokens_compared == 1
    assert not compare(ours, clear, torch.float32).agrees


def test_compare_uses_our_margins_if_the_oracle_has_none() -> None:
    without = Run([[1, 2]], [], [[-1.0, -1.0]])
    assert compare(run_of([[1, 9]], margin=5e-5), without, torch.float32).agrees
    assert not compare(run_of([[1, 9]], margin=2e-4), without, torch.float32).agrees


def test_compare_rejects_a_constant_oracle() -> None:
    constant = run_of([[0, 0, 0]], logprob=-9.0, margin=0.0)
    found = compare(run_of([[5, 6, 7]]), constant, torch.float32)
    assert not found.agrees and "differ by" in str(found.difference)
    infinite = compare(run_of([[5]]), run_of([[5]], logprob=-math.inf), torch.float32)
    assert not infinite.agrees and infinite.max_logprob_difference is None


def test_compare_rejects_other_lengths_and_missing_scores() -> None:
    assert not compare(run_of([[1]]), run_of([[1, 2]]), torch.float32).agrees
    with pytest.raises(ValueError, match="log-probabilities of both runs"):
        compare(Run([[1]], [0.0]), run_of([[1]]), torch.float32)
