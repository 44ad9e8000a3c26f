"""Weights of the native kernels. A dense one is row-major, a quantised one in the order PLAIN: both as they are loaded.

int4 needs no order of its own: the kernels reorder the inputs, once per token, instead of the weights.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from fastllama.kernels.native.library import DTYPES, FORMATS
from fastllama.kernels.native.memory import allocate
from fastllama.kernels.quantized import QuantizedWeight, Weight


def pack(*parts: Weight) -> Weight:
    """Concatenate weights (rows_i, E) that are applied to the same input -> (sum of rows, E).

    Quantised weights must have the same format, groups and kinds of scales and offsets.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return first.contiguous() if len(parts) == 1 else _concatenated([cast(Tensor, part) for part in parts])
    quantized = [cast(QuantizedWeight, part) for part in parts]
    offsets = [part.offsets for part in quantized if part.offsets is not None]
    return replace(
        first,
        values=_concatenated([part.values for part in quantized]),
        scales=_concatenated([part.scales for part in quantized]),
        offsets=_concatenated(offsets) if offsets else None,
    )


def _concatenated(parts: list[Tensor]) -> Tensor:
    """A copy in large pages."""
    rows = sum(part.shape[0] for part in parts)
    return torch.cat(parts, out=allocate((rows, *parts[0].shape[1:]), parts[0].dtype, parts[0].device))


def fields_of(weight: Weight) -> dict[str, Tensor | int | None]:
    """The fields of an op that describe its weight."""
    if isinstance(weight, Tensor):
        return {"weight": weight}
    return {
        **{"weight": weight.values, "scales": weight.scales, "offsets": weight.offsets},
        **{"format": FORMATS[weight.format], "scale_dtype": DTYPES[weight.scales.dtype]},
        **{"has_zeros": int(weight.has_zeros), "n_scales": weight.scales.shape[1]},
    }
