"""Rounds a weight to 4 bits so that its products change least, by GPTQ (Frantar and others, 2022, arXiv 2210.17323).

With inputs x of the weight, whose second moments are M = Σ x·xᵀ, a rounding ŵ of a row w changes its products by

    Σ ((w - ŵ) · x)²  =  (w - ŵ) · M · (w - ŵ)ᵀ

So columns whose inputs are large matter more, and an error in one column can be made good in others whose inputs go
with its. Scales and zeros are chosen first, with each column's errors weighed by its entry on M's diagonal. Then
columns are rounded one after another, those with the largest inputs first. After each, the columns that are left move
so that the products change least, as the upper Cholesky factor U of M⁻¹ says: column j moves by
-(w_i - ŵ_i) / U_ii · U_ij.
"""

import torch
from torch import Tensor

from fastllama.int4_rounding import NOT_FINITE, best_rounding, quantized_values
from fastllama.kernels.quantized import QuantizedWeight, pack_int4

# Part of the mean of M's diagonal that is added to the diagonal. It keeps M's inverse exact enough, and limits how far
# columns move for correlations that a short text has by chance.
DAMPING = 0.01
BLOCK = 128  # columns


def gptq(weight: Tensor, moments: Tensor, group_size: int) -> QuantizedWeight:
    """A weight (OUT, IN) as int4 with zeros, by moments (IN, IN), on their device. ValueError if it is not finite."""
    w = weight.detach().to(moments.device, torch.float32, copy=True)
    if not bool(w.isfinite().all()):
        raise ValueError(NOT_FINITE)
    damped = _damped(moments)
    importance = damped.diagonal().float().view(-1, group_size)
    groups = best_rounding(w.view(w.shape[0], -1, group_size), integer_zeros=True, importance=importance)
    order = damped.diagonal().argsort(descending=True, stable=True)
    scale, zero = (one[:, order // group_size, 0].float() for one in (groups.scale, groups.offset))
    q = torch.empty_like(w, dtype=torch.uint8)
    q[:, order] = _rounded_columns(w[:, order], scale, zero, _factor(damped[order][:, order]))
    return QuantizedWeight("int4", pack_int4(q), groups.scale[..., 0], groups.offset[..., 0], has_zeros=True)


def _rounded_columns(w: Tensor, scale: Tensor, zero: Tensor, factor: Tensor) -> Tensor:
    """q (OUT, IN) of columns in the order in which they are rounded, each with its scales and zeros (OUT, IN).

    A column moves the others of its block at once, those after the block when the block is done.
    """
    q = torch.empty_like(w, dtype=torch.uint8)
    for begin in range(0, w.shape[1], BLOCK):
        end = min(begin + BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, begin:end])
        for i in range(begin, end):
            q[:, i], rounded = quantized_values(w[:, i], scale[:, i], zero[:, i], integer_zeros=True)
            errors[:, i - begin] = (w[:, i] - rounded) / factor[i, i]
            w[:, i + 1 : end] -= torch.outer(errors[:, i - begin], factor[i, i + 1 : end])
        w[:, end:] -= errors @ factor[begin:end, end:]
    return q


def _damped(moments: Tensor) -> Tensor:
    """M with damping, in float64."""
    wide = moments.double()
    mean = wide.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return wide + torch.eye(len(wide), dtype=wide.dtype, device=wide.device) * (mean * DAMPING)


def _factor(damped: Tensor) -> Tensor:
    """U, in float32."""
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor.float()
