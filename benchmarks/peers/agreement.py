"""Compares tokens and log-probabilities of a peer with ours, for the same greedy prompts."""

import math
from dataclasses import dataclass

import torch

from fastllama.benchmarks.runners import Run, ServedRun
from fastllama.benchmarks.tolerances import TOLERANCES


@dataclass(frozen=True)
class Agreement:
    """The result of comparing two greedy runs.

    A row is compared up to its first different token. If the two best logits differ there by at most the tolerance, it
    is a tie and no disagreement: both tokens are correct.
    """

    agrees: bool
    tokens_compared: int
    tokens_total: int
    max_logprob_difference: float | None  # None if it is not finite
    tolerance: float
    difference: str | None = None


def compare(ours: Run | ServedRun, oracle: Run | ServedRun, dtype: torch.dtype) -> Agreement:
    """Compare two runs of the same prompts, with the oracle's margins, or ours if it has none.

    ValueError if log-probabilities or all margins are missing.
    """
    margins = ours.margins if oracle.margins is None else oracle.margins
    if ours.logprobs is None or oracle.logprobs is None or margins is None:
        raise ValueError("a comparison needs log-probabilities of both runs and margins of one")
    tolerance = TOLERANCES["logprobs", dtype]
    total = sum(len(row) for row in oracle.tokens)
    lengths, expected_lengths = ([len(row) for row in run.tokens] for run in (ours, oracle))
    if lengths != expected_lengths:
        difference = f"lengths differ: ours {lengths}, the peer's {expected_lengths}"
        return Agreement(False, 0, total, 0.0, tolerance, difference)
    compared, worst = 0, 0.0
    found: str | None = None
    for row, both in enumerate(zip(ours.tokens, oracle.tokens, strict=True)):
        for step, (token, expected) in enumerate(zip(*both, strict=True)):
            margin = margins[row][step]
            gap = abs(ours.logprobs[row][step] - oracle.logprobs[row][step])
            if token != expected:
                # A tie: for both runs the two tokens have nearly the same probability.
                if not (margin <= tolerance and gap <= 2 * tolerance):
                    found = found or (
                        f"row {row} step {step}: our token {token}, the peer's {expected}, margin {margin:.3g}, "
                        f"log-probabilities differ by {gap:.3g}"
                    )
                break
            # Not `gap > tolerance`: a NaN must count as a difference.
            if not gap <= tolerance:
                found = found or f"row {row} step {step}: log-probabilities differ by {gap:.3g}"
            worst = max(worst, gap)
            compared += 1
    return Agreement(found is None, compared, total, worst if math.isfinite(worst) else None, tolerance, found)
