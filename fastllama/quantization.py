"""Quantises weights: chooses a format for each, and rounds to it.

Matrices are quantised, with a scale per row (int8, fp8) or with a scale and a minimum per group of columns (int4).
Norms, biases and the embedding stay as they are. The vocabulary projection is int8 where the others are int4.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.args import EMBEDDING_NAME, OUTPUT_NAME, ModelArgs
from fastllama.int4_rounding import NOT_FINITE, best_rounding
from fastllama.kernels.quantized import BITS, ELEMENTS_AT_ONCE, QuantizedWeight, Weight, concatenated, pack_int4

# A layer's matrices by Meta's names, those together that are packed into one weight.
QKV_NAMES = ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight")
GATE_UP_NAMES = ("feed_forward.w1.weight", "feed_forward.w3.weight")
LAYER_MATRICES = (QKV_NAMES, ("attention.wo.weight",), GATE_UP_NAMES, ("feed_forward.w2.weight",))
NOT_QUANTIZED = (EMBEDDING_NAME, "norm.weight", ".bias")  # ends of names
INT4_GROUPS = (128, 64, 32)
FLOAT32_BYTES, HALF_BYTES = 4, 2
MAX_INT8, MAX_FP8 = 127, 448.0
FP8_CAPABILITY = (8, 9)  # the first compute capability whose GPUs convert e4m3


class Scheme(NamedTuple):
    """How a weight is quantised. Weights of one scheme and of as many columns can be one weight.

    Attributes:
        format: one of kernels.quantized.FORMATS.
        group_size: columns that share a scale, in CHOICES at most; 0 is a scale per row.
        has_zeros: whether int4's offsets are zeros, else they are minima.
        has_bfloat16_scales: whether scales of groups are bfloat16, else they are float16.
    """

    format: str
    group_size: int = 0
    has_zeros: bool = False
    has_bfloat16_scales: bool = False


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
    """How a weight is quantised. A row that is one group has 16-bit scales, as other groups do."""
    dtype = weight.scales.dtype
    group_size = 0 if dtype == torch.float32 else weight.group_size
    return Scheme(weight.format, group_size, weight.has_zeros, dtype == torch.bfloat16)


def packed_scheme(name: str, in_features: int, quantize: str | None, stored: Iterable[Scheme | None]) -> Scheme | None:
    """The scheme that all parts of a packed weight get, given one part's name and columns; None if they are dense.

    stored: each part's as it is, None if it is dense. Parts of the format that is asked for, or of any if none is, keep
    it. If the parts would then differ, all get the scheme that is asked for; without one, all are dequantised.
    """
    asked = scheme_of(quantize, name, in_features)
    chosen = {one if one is not None and (asked is None or asked.format == one.format) else asked for one in stored}
    return chosen.pop() if len(chosen) == 1 else asked


def model_schemes(
    quantize: str | None, args: ModelArgs, stored: Mapping[str, Scheme] = NOTHING_QUANTIZED
) -> dict[str, Scheme]:
    """The scheme of every weight of a model, or of a process's part of one, that is quantised.

    stored: of the weights that are quantised in the files, by name.
    """
    schemes: dict[str, Scheme] = {}
    for names in _packed_names(args):
        columns = args.shapes[names[0]][1]
        scheme = packed_scheme(names[0], columns, quantize, [stored.get(name) for name in names])
        if scheme is not None:
            schemes |= dict.fromkeys(names, scheme)
    return schemes


def _packed_names(args: ModelArgs) -> Iterator[tuple[str, ...]]:
    """The names of all matrices but the embedding, those of one packed weight together."""
    for layer in range(args.n_layers):
        for names in LAYER_MATRICES:
            yield tuple(f"layers.{layer}.{name}" for name in names)
    yield (OUTPUT_NAME,)


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
    if quantize is not None and not (isinstance(quantize, str) and quantize in CHOICES):
        raise ValueError(f"quantize must be one of {', '.join(CHOICES)}, or None, got {quantize!r}")
    for scheme in set(model_schemes(quantize, args, stored).values()):
        check_device(scheme, device)


def converts_fp8(device: torch.device) -> bool:
    """Whether the device has conversions of e4m3, or is a CPU, which needs none."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def check_device(scheme: Scheme, device: torch.device) -> None:
    """Raise ValueError if the device cannot run a weight of this scheme."""
    if scheme.format == "fp8" and not converts_fp8(device):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"fp8 weights need a GPU of compute capability 8.9 or later, and {torch.cuda.get_device_name(device)} has "
            f"{capability}: use quantize='int8', which has as many bits"
        )


def with_scheme(name: str, weight: Weight, scheme: Scheme, device: torch.device) -> QuantizedWeight:
    """The weight of this name, quantised on the device. One that has the scheme already keeps its bits."""
    if isinstance(weight, QuantizedWeight):
        weight = weight.to(device)
        if scheme_of_weight(weight) == scheme:
            return weight
        weight = weight.dequantized()
    with naming(name):
        return quantized(weight.to(device), scheme)


@contextlib.contextmanager
def naming(weight: str) -> Iterator[None]:
    """A block that rounds a weight of this name: errors about its values begin with the name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{weight}: {error}") from error


def quantized(weight: Tensor, scheme: Scheme, *, integer_zeros: bool = False) -> QuantizedWeight:
    """A weight (OUT, IN) quantised on its device, a few rows at a time.

    integer_zeros: int4 has zeros, whole numbers from 0 to 15 as files of other programs need them, instead of minima.
    Raises ValueError, which `naming` completes, for values that are not finite or too large for the scheme.
    """
    step = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    parts = []
    for begin in range(0, weight.shape[0], step):
        rows = weight[begin : begin + step].detach().float()
        if not bool(rows.isfinite().all()):
            raise ValueError(NOT_FINITE)
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
