"""A matrix product of many tokens by oneDNN, which takes row-major weights as they are.

`F.linear` in float32 is MKL's product, which on AMD's CPUs takes two to three times as long.

oneDNN compiles a kernel for every number of tokens, and keeps a thousand of them, of about 1 MB each. Prompts have any
length, so numbers of tokens are rounded up to one of a few.
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
    n_tokens = x.shape[0]
    if rounded_up(n_tokens) > n_tokens:
        x = F.pad(x, (0, 0, 0, rounded_up(n_tokens) - n_tokens))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y[:n_tokens]


def rounded_up(n_tokens: int) -> int:
    """The next of eight numbers between each power of two and the next: at most an eighth more."""
    step = 1 << max(0, (n_tokens - 1).bit_length() - 4)
    return -(-n_tokens // step) * step


def _takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
