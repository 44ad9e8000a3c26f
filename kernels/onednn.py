"""A matrix product of many tokens by oneDNN, which takes row-major weights as they are.

`F.linear` in float32 is MKL's product, which on AMD's CPUs takes two to three times as long.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias: x (N, E), weight (rows, E), bias (rows,) -> (N, rows).

    By `F.linear` if oneDNN does not take the dtype.
    """
    if not _takes(weight.dtype):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
