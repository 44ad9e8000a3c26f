"""A matrix product of many tokens by oneDNN, which takes row-major weights as they are.

`F.linear` in float32 is MKL's product, which on AMD's CPUs takes two to three times as long.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ: x (N, E), weight (rows, E) -> (N, rows), by `F.linear` if oneDNN does not take the dtype."""
    if not _takes(weight.dtype):
        return F.linear(x, weight)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
