"""Quantised weights for tests of the native kernels: every format, group, dtype of the scales and kind of offsets."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastllama.kernels.quantized import QuantizedWeight
from fastllama.quantization import Scheme, quantized
from tests.kernels.guards import GuardedMemory


def _by_row(kind: str) -> Callable[[Tensor], QuantizedWeight]:
    return lambda dense: quantized(dense, Scheme(kind))


def _bytes_in_groups(kind: str, size: int, dtype: torch.dtype) -> Callable[[Tensor], QuantizedWeight]:
    """8-bit numbers in groups, as GGUF's Q8_0 has them."""

    def make(dense: Tensor) -> QuantizedWeight:
        rows = dense.shape[0]
        one_group_per_row = quantized(dense.view(-1, size), Scheme(kind))
        scales = one_group_per_row.scales.view(rows, -1).to(dtype)
        return replace(one_group_per_row, values=one_group_per_row.values.view(rows, -1), scales=scales)

    return make


def _int4(size: int, dtype: torch.dtype, *, zeros: bool) -> Callable[[Tensor], QuantizedWeight]:
    def make(dense: Tensor) -> QuantizedWeight:
        weight = quantized(dense, Scheme("int4", size or dense.shape[1]), integer_zeros=zeros)
        assert weight.offsets is not None
        return replace(weight, scales=weight.scales.to(dtype), offsets=weight.offsets.to(dtype))

    return make


HALF, BFLOAT16 = torch.float16, torch.bfloat16
# Name: (what quantises a dense weight, what its columns are a multiple of).
KINDS: dict[str, tuple[Callable[[Tensor], QuantizedWeight], int]] = {
    "int8": (_by_row("int8"), 1),
    "int8-g32": (_bytes_in_groups("int8", 32, HALF), 32),
    "int8-g32-bf16": (_bytes_in_groups("int8", 32, BFLOAT16), 32),
    "int8-g64": (_bytes_in_groups("int8", 64, HALF), 64),
    "fp8": (_by_row("fp8"), 1),
    "fp8-g32": (_bytes_in_groups("fp8", 32, HALF), 32),
    "int4-g32": (_int4(32, HALF, zeros=False), 32),
    "int4-g32-zeros": (_int4(32, HALF, zeros=True), 32),
    "int4-g64-bf16": (_int4(64, BFLOAT16, zeros=False), 64),
    "int4-g64-zeros-bf16": (_int4(64, BFLOAT16, zeros=True), 64),
    "int4-g128": (_int4(128, HALF, zeros=False), 128),
    "int4-g128-zeros": (_int4(128, HALF, zeros=True), 128),
    "int4-rows": (_int4(0, torch.float32, zeros=True), 32),
}


def guarded_copy(weight: QuantizedWeight, memory: GuardedMemory) -> QuantizedWeight:
    """A copy whose tensors are between guard bands."""
    return replace(
        weight,
        values=memory.copy(weight.values),
        scales=memory.copy(weight.scales),
        offsets=None if weight.offsets is None else memory.copy(weight.offsets),
    )
