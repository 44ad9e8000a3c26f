"""Rounds groups of weights to 4 bits: chooses each group's scale and offset.

    w = scale · (q - zero)       q and zero from 0 to 15
    w = scale · q + minimum      q from 0 to 15

Several ranges are tried for each group, and each is refined by least squares. The rounding with the smallest squared
error is taken.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

MAX_INT4 = 15
# The error of every way of rounding. The caller puts the weight's name before it (fastllama.quantization.naming).
NOT_FINITE = "holds values that are not finite: the checkpoint is damaged; download it again"
# Ranges that are tried for a group, as shares of that from its smallest to its largest weight. A range that leaves out
# the extremes is finer for the others.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)
WEIGHED_SHARES = (*SHARES, 0.64, 0.56)  # where the extremes may be in columns that matter little
SHIFTS = (0, -1, 1)  # of a range, in steps: zeros beside the one in its middle
REFITS = 2  # least-squares fits of scale and offset to the rounded values, per range


class Rounding(NamedTuple):
    """A rounding of groups (OUT, G, size); the other tensors (OUT, G, 1), scale and offset in float16."""

    error: Tensor  # squared, summed over the group
    q: Tensor
    scale: Tensor
    offset: Tensor  # a zero or a minimum


def best_rounding(w: Tensor, integer_zeros: bool, importance: Tensor | None = None) -> Rounding:
    """For each group of w (OUT, G, size), float32, the rounding with the smallest squared error among those tried.

    integer_zeros: the offsets are zeros, else minima. importance: (G, size), positive, by which a column's squared
    errors are multiplied; None: all alike. Raises ValueError for weights that are too large for scales in float16.
    """
    weights = torch.ones_like(w[:1]) if importance is None else importance[None]
    weights = weights / weights.sum(-1, keepdim=True)
    least, most = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if integer_zeros:  # such a range holds 0
        least, most = least.clamp(max=0), most.clamp(min=0)
    middle, width = (least + most) / 2, most - least
    best = _rounded(w, width / MAX_INT4, least, integer_zeros, weights)
    for share, shift in product(SHARES if importance is None else WEIGHED_SHARES, SHIFTS if integer_zeros else (0,)):
        scale = share * width / MAX_INT4
        tried = _rounded(w, scale, middle - share * width / 2 + shift * scale, integer_zeros, weights)
        best = _better(best, tried)
        for _ in range(REFITS):
            tried = _rounded(w, *_refitted(w, tried, integer_zeros, weights), integer_zeros, weights)
            best = _better(best, tried)
    if not bool((best.scale.isfinite() & best.offset.isfinite()).all()):
        raise ValueError(f"int4 has scales in float16, and a weight is {float(w.abs().max()):.3g}: use int8")
    return best


def quantized_values(w: Tensor, scale: Tensor, offset: Tensor, integer_zeros: bool) -> tuple[Tensor, Tensor]:
    """(q, the weights that it stands for) of weights with given scales and offsets, all float32."""
    step = torch.where(scale > 0, scale, 1)
    q = (w / step + offset if integer_zeros else (w - offset) / step).round().clamp(0, MAX_INT4)
    return q, scale * (q - offset) if integer_zeros else scale * q + offset


def _rounded(w: Tensor, scale: Tensor, minimum: Tensor, integer_zeros: bool, weights: Tensor) -> Rounding:
    """The rounding with a scale and a minimum, both rounded first; with integer_zeros the minimum becomes a zero."""
    scale = scale.half()
    step = torch.where(scale > 0, scale.float(), 1)
    offset = (-minimum / step).round().clamp(0, MAX_INT4) if integer_zeros else minimum.half().float()
    q, dequantized = quantized_values(w, scale.float(), offset, integer_zeros)
    error = (weights * (w - dequantized).square()).sum(-1, keepdim=True)
    return Rounding(error, q, scale, offset.half())


def _refitted(w: Tensor, found: Rounding, integer_zeros: bool, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the minimum with the smallest squared error for a rounding's q; zeros stay."""
    mean_q = (weights * found.q).sum(-1, keepdim=True)
    n = found.q - (found.offset.float() if integer_zeros else mean_q)
    power = (weights * n.square()).sum(-1, keepdim=True)
    fitted = (weights * w * n).sum(-1, keepdim=True) / power.clamp(min=1e-30)
    scale = torch.where((power > 0) & (fitted > 0), fitted, found.scale.float())
    if integer_zeros:
        return scale, -scale * found.offset.float()
    return scale, (weights * w).sum(-1, keepdim=True) - scale * mean_q


def _better(one: Rounding, other: Rounding) -> Rounding:
    """For each group the rounding with the smaller error; the first if they are equal."""
    wins = other.error < one.error
    return Rounding(*(torch.where(wins, new, old) for old, new in zip(one, other, strict=True)))
