"""Quantised weights for the tests of the kernels that take them, by the name of their format, groups and offsets."""

from dataclasses import replace

import torch
from torch import Tensor

from fastllama.kernels.quantized import QuantizedWeight
from fastllama.quantization import Scheme, quantized
from tests.kernels.projection.cases import Case

FORMATS = {
    "int8": Scheme("int8"),
    "fp8": Scheme("fp8"),
    "int4-g128": Scheme("int4", 128),
    "int4-g64": Scheme("int4", 64),
    "int4-g32": Scheme("int4", 32),
}
BY_ROW = ("int8", "fp8")
# Formats of other programs' files, too: zeros instead of minima, bfloat16 scales, int8 in groups of 32.
NAMES = (*FORMATS, "int4-g128-zeros", "int4-g32-bf16", "int8-g32")


def quantized_as(name: str, weight: Tensor) -> QuantizedWeight:
    """A weight in a format of NAMES, in plain order."""
    if name == "int8-g32":
        return _int8_in_groups(weight.float())
    kind, *options = name.removesuffix("-zeros").removesuffix("-bf16").split("-")
    packed = quantized(weight, FORMATS["-".join([kind, *options])], integer_zeros=name.endswith("-zeros"))
    if not name.endswith("-bf16"):
        return packed
    assert packed.offsets is not None
    return replace(packed, scales=packed.scales.bfloat16(), offsets=packed.offsets.bfloat16())


def _int8_in_groups(weight: Tensor) -> QuantizedWeight:
    groups = weight.view(weight.shape[0], -1, 32)
    scales = (groups.abs().amax(-1) / 127).half()
    q = (groups / scales.float().clamp(min=1e-6)[..., None]).round().clamp(-128, 127)
    q[0, 0, 0] = -128  # a value that ours does not make
    return QuantizedWeight("int8", q.flatten(1).to(torch.int8), scales)


def quantize_case(case: Case, name: str) -> None:
    """Replace a case's weights by quantised ones, in plain order, which the reference takes."""
    for attribute in ("wqkv", "w13", "w2"):
        setattr(case, attribute, quantized_as(name, getattr(case, attribute)))
