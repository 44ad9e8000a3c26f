"""Rounds a weight to 4 bits so that its products change least, by GPTQ (Frantar and others, 2022, arXiv 2210.17323).

With inputs x of the weight, whose second moments are M = Σ x·xᵀ, a rounding ŵ of a row w changes its products by

    Σ ((w - ŵ) · x)²  =  (w - ŵ) · M · (w - ŵ)ᵀ

So columns whose inputs are large matter more, and an error in one column can be made good in others whose inputs go
with its. Scales and zeros are chosen first, with each column's errors weighed by its entry on M's diagonal. Then
columns are rounded one after another, those with the largest inputs first. After each, the columns that are left move
so that the products change least, as the upper Cholesky factor U of M⁻¹ says: column j moves by
-(w_i - ŵ_i) / U_ii · U_ij.
"""

from typing import cast

import torch
from torch import Tensor

from fastllama.int4_rounding import NOT_FINITE, best_rounding, quantized_values
from fastllama.kernels.quantized import ELEMENTS_AT_ONCE, QuantizedWeight, pack_int4

# Part of the mean of M's diagonal that is added to the diagonal. It keeps M's inverse exact enough, and limits how far
# columns move for correlations that a short text has by chance.
DAMPING = 0.01
BLOCK = 128  # columns


def gptq(weight: Tensor, moments: Tensor, group_size: int) -> QuantizedWeight:
    """A weight (OUT, IN) as int4 with zeros, by moments (IN, IN), on their device. ValueError if it is not finite."""
    w = weight.detach().to(moments.device, torch.float32)
    if not bool(w.isfinite().all()):
        raise ValueError(NOT_FINITE)
    damped = _damped(moments)
    diagonal = damped.diagonal().clone()
    scale, zero = _scales_and_zeros(w, diagonal.float().view(-1, group_size))
    order = diagonal.argsort(descending=True, stable=True)
    factor = _factor(damped[order[:, None], order])
    del damped
    q = torch.empty_like(w, dtype=torch.uint8)
    q[:, order] = _rounded_columns(w[:, order], scale, zero, order // group_size, factor)
    return QuantizedWeight("int4", pack_int4(q), scale, zero, has_zeros=True)


def _scales_and_zeros(w: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """(OUT, G) float16 each, of the groups of w (OUT, IN), a few rows at a time."""
    step = max(1, ELEMENTS_AT_ONCE // w.shape[1])
    parts = [
        best_rounding(rows.view(rows.shape[0], *importance.shape), integer_zeros=True, importance=importance)
        for rows in w.split(step)
    ]
    return torch.cat([part.scale[..., 0] for part in parts]), torch.cat([part.offset[..., 0] for part in parts])


def _rounded_columns(w: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, factor: Tensor) -> Tensor:
    """q (OUT, IN) of columns in the order in which they are rounded, given each column's group; w is overwritten.

    A column moves the others of its block at once, those after the block when the block is done.
    """
    q = torch.empty_like(w, dtype=torch.uint8)
    for begin in range(0, w.shape[1], BLOCK):
        end = min(begin + BLOCK, w.shape[1])
        scale, zero = (one[:, groups[begin:end]].float() for one in (scales, zeros))
        errors = torch.empty_like(w[:, begin:end])
        for i in range(begin, end):
            at = i - begin
            q[:, i], rounded = quantized_values(w[:, i], scale[:, at], zero[:, at], integer_zeros=True)
            errors[:, at] = (w[:, i] - rounded) / factor[i, i]
            w[:, i + 1 : end] -= torch.outer(errors[:, at], factor[i, i + 1 : end])
        w[:, end:] -= errors @ factor[begin:end, end:]
    return q


def _damped(moments: Tensor) -> Tensor:
    """M with damping, in float64."""
    wide = moments.to(torch.float64, copy=True)
    wide.diagonal().add_(wide.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny) * DAMPING)
    return wide


def _factor(damped: Tensor) -> Tensor:
    """U, in float32. ValueError if M is not positive definite, which its damping prevents."""
    lower, failed = torch.linalg.cholesky_ex(damped)
    factor, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or failed_again:
        raise ValueError("its inputs on the calibration text cannot be inverted: give another text")
    return cast(Tensor, factor).float()
