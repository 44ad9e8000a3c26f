"""Projections of more tokens than the kernels take alone: the library's matrix product.

A quantised weight is dequantised to the model dtype, in large parts: the kernels' and the library's threads get into
each other's way, so they should alternate rarely.
"""

import torch
from torch import Tensor

from fastllama.kernels import onednn
from fastllama.kernels.native import arguments
from fastllama.kernels.native.library import Kind, empty, run
from fastllama.kernels.native.weights import fields_of
from fastllama.kernels.quantized import QuantizedWeight, Weight

PART_BYTES = 2**25  # of the dequantised rows that are in memory at once


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias: x (N, E), weight (rows, E), bias (rows,) -> (N, rows)."""
    if isinstance(weight, Tensor):
        return onednn.linear(x, weight, bias)
    arguments.check_inputs("x", x)
    arguments.check_quantized(weight, x.shape[1])
    n_rows, width = weight.shape
    step = max(1, PART_BYTES // (width * x.dtype.itemsize))
    y = torch.empty(x.shape[0], n_rows, dtype=x.dtype)
    for begin in range(0, n_rows, step):
        part = slice(begin, min(begin + step, n_rows))
        dense = dequantized(weight.rows(begin, part.stop - begin), x.dtype)
        y[:, part] = onednn.linear(x, dense, None if bias is None else bias[part])
    return y


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight (OUT, IN) in a model dtype."""
    n_rows, width = weight.shape
    out = empty((n_rows, width), dtype)
    run(Kind.DEQUANTIZE, dtype, out=out, outputs=n_rows, width=width, **fields_of(weight))
    return out
