"""Rounds a weight to 4 bits so that its products change least, by GPTQ (Frantar and others, 2022, arXiv 2210.17323).

With inputs x of the weight, whose second moments are M = Σ x·xᵀ, a rounding ŵ of a row w changes its products by

    Σ ((w - ŵ) · x)²  =  (w - ŵ) · M · (w - ŵ)ᵀ

So columns whose inputs are large matter more, and an error in one column can be made good in others whose inputs go
with its. Columns are rounded one after another. After each, the columns that are left move so that the products change
least, as the upper Cholesky factor U of M⁻¹ says: column j moves by -(w_i - ŵ_i) / U_ii · U_ij.
"""

import torch
from torch import Tensor

from fastllama.int4_rounding import NOT_FINITE, best_rounding, quantized_values
from fastllama.kernels.quantized import QuantizedWeight, pack_int4

# Part of the mean of M's diagonal that is added to the diagonal. It keeps M's inverse exact enough, and limits how far
# columns move for correlations that a short text has by chance.
DAMPING = 0.01
MORE_DAMPING = 10  # times as much, if M's inverse still is not positive definite


def gptq(weight: Tensor, moments: Tensor, group_size: int) -> QuantizedWeight:
    """A weight (OUT, IN) as int4 with zeros, by moments (IN, IN), on their device. ValueError if it is not finite."""
    w = weight.detach().to(moments.device, torch.float32, copy=True)
    if not bool(w.isfinite().all()):
        raise ValueError(NOT_FINITE)
    damped, factor = _damped_and_factor(moments)
    importance = damped.diagonal().float()
    q, scales, zeros = torch.empty_like(w, dtype=torch.uint8), [], []
    for begin in range(0, w.shape[1], group_size):
        group = slice(begin, begin + group_size)
        best = best_rounding(w[:, None, group], integer_zeros=True, importance=importance[None, group])
        q[:, group], errors = _round_columns(w[:, group], best.scale[:, 0], best.offset[:, 0], factor[group, group])
        w[:, group.stop :] -= errors @ factor[group, group.stop :]
        scales.append(best.scale[:, 0])
        zeros.append(best.offset[:, 0])
    return QuantizedWeight("int4", pack_int4(q), torch.cat(scales, 1), torch.cat(zeros, 1), has_zeros=True)


def _round_columns(w: Tensor, scale: Tensor, zero: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Round the columns of a group (OUT, size), which move -> q, and each column's error over its U_ii."""
    q, errors = torch.empty_like(w, dtype=torch.uint8), torch.empty_like(w)
    scale, zero = scale[:, 0].float(), zero[:, 0].float()
    for i in range(w.shape[1]):
        q[:, i], rounded = quantized_values(w[:, i], scale, zero, integer_zeros=True)
        errors[:, i] = (w[:, i] - rounded) / factor[i, i]
        w[:, i + 1 :] -= torch.outer(errors[:, i], factor[i, i + 1 :])
    return q, errors


def _damped_and_factor(moments: Tensor) -> tuple[Tensor, Tensor]:
    """M with damping, in float64, and U in float32."""
    wide = moments.double()
    diagonal = wide.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = DAMPING
    while True:
        damped = wide + torch.eye(len(wide), dtype=wide.dtype, device=wide.device) * diagonal * damping
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return damped, upper.float()
        damping *= MORE_DAMPING
