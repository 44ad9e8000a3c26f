"""Quantises weights: chooses a format for each, and rounds to it.

Matrices are quantised, with a scale per row (int8, fp8) or with a scale and a minimum per group of columns (int4).
Norms, biases and the embedding stay as they are. The vocabulary projection is int8 where the others are int4.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.int4_rounding import best_rounding
from fastllama.kernels.quantized import BITS, ELEMENTS_AT_ONCE, QuantizedWeight, Weight, concatenated, pack_int4

OUTPUT_NAME = "output.weight"
NOT_QUANTIZED = ("tok_embeddings.weight", "norm.weight", ".bias")  # ends of names
INT4_GROUPS = (128, 64, 32)
FLOAT32_BYTES, HALF_BYTES = 4, 2
MAX_INT8, MAX_FP8 = 127, 448.0
FP8_CAPABILITY = (8, 9)  # the first compute capability whose GPUs convert e4m3


class Scheme(NamedTuple):
    """How a weight is quantised. group_size: the most columns that share a scale; 0 is a scale per row."""

    format: str
    group_size: int = 0


CHOICES = {
    "int8": Scheme("int8"),
    "fp8": Scheme("fp8"),
    "int4": Scheme("int4", 128),
    "int4-g64": Scheme("int4", 64),
    "int4-g32": Scheme("int4", 32),
}


NOTHING_QUANTIZED: Mapping[str, Scheme] = MappingProxyType({})


def scheme_of(quantize: str | None, name: str, in_features: int) -> Scheme | None:
    """The scheme of a weight, given Meta's name and its columns; None if it is not quantised.

    int4's groups are the largest of 128, 64 and 32 that is allowed and divides the columns. ValueError if none does.
    """
    if quantize is None or name.endswith(NOT_QUANTIZED):
        return None
    scheme = CHOICES[quantize]
    if scheme.format != "int4":
        return scheme
    if name == OUTPUT_NAME:
        return CHOICES["int8"]
    for size in INT4_GROUPS:
        if size <= scheme.group_size and in_features % size == 0:
            return Scheme("int4", size)
    raise ValueError(
        f"int4 takes weights whose columns are a multiple of {INT4_GROUPS[-1]}, and {name} has {in_features}: "
        "use int8, or fewer processes"
    )


def scheme_of_weight(weight: QuantizedWeight) -> Scheme:
    """How a weight is quantised."""
    return Scheme(weight.format, weight.group_size if weight.scales.shape[1] > 1 else 0)


def model_schemes(
    quantize: str | None, args: ModelArgs, stored: Mapping[str, Scheme] = NOTHING_QUANTIZED
) -> dict[str, Scheme]:
    """The scheme of every weight of a model, or of a process's part of one, that is quantised.

    stored: of the weights that are quantised in the files, by name. Those of the format that is asked for stay.
    """
    shapes = {name: shape for name, shape in args.shapes.items() if not name.endswith(NOT_QUANTIZED)}
    asked = {name: scheme_of(quantize, name, shape[1]) for name, shape in shapes.items()}
    schemes = {name: _chosen(asked[name], stored.get(name)) for name in shapes}
    return {name: scheme for name, scheme in schemes.items() if scheme is not None}


def _chosen(asked: Scheme | None, stored: Scheme | None) -> Scheme | None:
    """The stored scheme if it has the format that is asked for, or nothing is asked for."""
    return stored if stored is not None and (asked is None or asked.format == stored.format) else asked


def bytes_of(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """The size of a weight (OUT, IN) with its scales and offsets."""
    rows, columns = shape
    values = rows * columns * BITS[scheme.format] // 8
    if not scheme.group_size:
        return values + rows * FLOAT32_BYTES
    per_group = HALF_BYTES * (2 if scheme.format == "int4" else 1)  # int4 has offsets, too
    return values + rows * columns // scheme.group_size * per_group


def check_quantize(
    quantize: str | None, args: ModelArgs, device: torch.device, stored: Mapping[str, Scheme] = NOTHING_QUANTIZED
) -> None:
    """Raise ValueError unless a model, or a process's part, of this shape can be quantised so and run on the device.

    stored: as in `model_schemes`.
    """
    if quantize is not None and quantize not in CHOICES:
        raise ValueError(f"quantize must be one of {', '.join(CHOICES)}, or None, got {quantize!r}")
    formats = {scheme.format for scheme in model_schemes(quantize, args, stored).values()}
    if "fp8" in formats and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"fp8 weights need a GPU of compute capability 8.9 or later, and {torch.cuda.get_device_name(device)} has "
            f"{capability}: use quantize='int8', which has as many bits"
        )


def quantized_if_asked(name: str, weight: Weight, quantize: str | None, device: torch.device) -> Weight:
    """The weight of this name, quantised on the device as `quantize` says. A dense weight stays where it is.

    One that has the format already keeps its bits, whatever its groups. One of another format is quantised anew.
    """
    scheme = scheme_of(quantize, name, weight.shape[-1])
    if isinstance(weight, QuantizedWeight):
        weight = weight.to(device)
        if scheme is None or scheme.format == weight.format:
            return weight
        weight = weight.dequantized()
    return weight if scheme is None else quantized(weight.to(device), scheme)


def quantized(weight: Tensor, scheme: Scheme, *, integer_zeros: bool = False) -> QuantizedWeight:
    """A weight (OUT, IN) quantised on its device, a few rows at a time.

    integer_zeros: int4 has zeros, whole numbers from 0 to 15 as files of other programs need them, instead of minima.
    Raises ValueError for weights that are not finite.
    """
    step = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    parts = []
    for begin in range(0, weight.shape[0], step):
        rows = weight[begin : begin + step].detach().float()
        if not bool(rows.isfinite().all()):
            raise ValueError("a weight to quantise holds values that are not finite: the checkpoint is damaged")
        is_int4 = scheme.format == "int4"
        parts.append(_int4(rows, scheme.group_size, integer_zeros) if is_int4 else _by_row(rows, scheme.format))
    return concatenated(parts)


def _by_row(rows: Tensor, kind: str) -> QuantizedWeight:
    """Symmetric: the largest value of a row is at the end of the range."""
    scales = rows.abs().amax(1, keepdim=True) / (MAX_INT8 if kind == "int8" else MAX_FP8)
    q = rows / torch.where(scales > 0, scales, 1)
    if kind == "int8":
        return QuantizedWeight(kind, q.round().clamp(-MAX_INT8, MAX_INT8).to(torch.int8), scales)
    bits = q.clamp(-MAX_FP8, MAX_FP8).to(torch.float8_e4m3fn).view(torch.uint8)
    return QuantizedWeight(kind, bits, scales)


def _int4(rows: Tensor, group_size: int, integer_zeros: bool) -> QuantizedWeight:
    """Groups of columns, each with the scale and offset of the smallest squared error found."""
    best = best_rounding(rows.view(rows.shape[0], -1, group_size), integer_zeros)
    values = pack_int4(best.q.flatten(1))
    return QuantizedWeight("int4", values, best.scale[..., 0], best.offset[..., 0], has_zeros=integer_zeros)
