"""Whether a peer gives our answers: tokens and log-probabilities of the same greedy prompts, compared."""

import math
from dataclasses import dataclass

import torch

from fastllama.benchmarks.runner import Run
from fastllama.benchmarks.tolerances import TOLERANCES


@dataclass(frozen=True)
class Agreement:
    """What the comparison of two greedy runs found.

    A row is compared until its tokens part. Parting at a step where the oracle's two best logits lie within the
    tolerance is no disagreement, for either choice is right there.
    """

    agrees: bool
    tokens_compared: int
    tokens_total: int
    max_logprob_difference: float | None  # None for one that is no number
    tolerance: float
    difference: str | None = None


def compare(ours: Run, oracle: Run, dtype: torch.dtype) -> Agreement:
    """Compare tokens and log-probabilities of the same prompts. ValueError when a run lacks what that takes."""
    if ours.logprobs is None or oracle.logprobs is None or oracle.margins is None:
        raise ValueError("a comparison needs log-probabilities of both runs and the oracle's margins")
    tolerance = TOLERANCES["logprobs", dtype]
    total = sum(len(row) for row in oracle.tokens)
    compared = 0
    worst = 0.0
    difference: str | None = None
    if [len(row) for row in ours.tokens] != [len(row) for row in oracle.tokens]:
        lengths = [len(row) for row in ours.tokens], [len(row) for row in oracle.tokens]
        return Agreement(False, 0, total, 0.0, tolerance, f"lengths differ: {lengths[0]} here, {lengths[1]} there")
    for row, (mine, theirs) in enumerate(zip(ours.tokens, oracle.tokens, strict=True)):
        for step, (token, expected) in enumerate(zip(mine, theirs, strict=True)):
            margin = oracle.margins[row][step]
            gap = abs(ours.logprobs[row][step] - oracle.logprobs[row][step])
            if token != expected:
                # Two tokens of nearly the same probability, to both.
                if not (margin <= tolerance and gap <= 2 * tolerance):
                    difference = difference or (
                        f"row {row} step {step}: token {token} here, {expected} there, margin {margin:.3g}, "
                        f"log-probabilities {gap:.3g} apart"
                    )
                break
            # Not `gap > tolerance`: a NaN must count as a difference.
            if not gap <= tolerance:
                difference = difference or f"row {row} step {step}: log-probabilities {gap:.3g} apart"
            worst = max(worst, gap)
            compared += 1
    return Agreement(
        difference is None, compared, total, worst if math.isfinite(worst) else None, tolerance, difference
    )
