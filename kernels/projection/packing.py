"""Quantised weights in the order of the kernels' loads: `pack` makes it once, `unpack` undoes it exactly.

A row is blocks, and a block is B words of 64 bits. Byte b of word i of a block holds

    int8, fp8    column 4·((b // 4)·B + i) + b % 4
    int4         the same in its low half; in its high half the column 8·B further on

A thread loads two words, 16 bytes, and needs x at their columns. These are two (int4: four) runs of 8 columns, 16 bytes
of bfloat16, and threads side by side need runs side by side. So all loads are wide, and no thread needs another's x.
Plain order gives threads with 16-byte loads of the weight 4-byte loads of x, or an exchange in shared memory.

A block is a group of columns; of a weight with a scale per row it is ROW_BLOCK columns, and rows are padded with zeros.
int4's scale and offset become one word of 32 bits, the scale in its low half.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.interpreter import interpreting
from fastllama.kernels.launch.sizes import ceil_div
from fastllama.kernels.launch.target import Target
from fastllama.kernels.quantized import (
    BITS,
    PLAIN,
    QuantizedWeight,
    concatenated,
    pack_int4,
    split,
    unpack_int4,
)

ORDER = "fused"
GROUPS = (32, 64, 128)
ROW_BLOCK = 64  # columns of a block of a weight with a scale per row
WORD_BYTES = 8
RUN = 4  # columns next to each other in a word


@dataclass(frozen=True)
class FusedWeight(QuantizedWeight):
    """A quantised weight (OUT, IN) in the order of the kernels' loads.

    Attributes:
        values: uint8 (OUT, bytes of a padded row).
        scales: float32 (OUT, 1); of groups (OUT, G) in 16 bits, or of int4 int32 with scale and offset.
        offsets: None.
        in_features: IN, without padding.
        scale_dtype: of the scales, and of the offsets.
    """

    in_features: int = 0
    scale_dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.in_features

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 if a row does."""
        return 0 if self.scale_dtype == torch.float32 else self.group_size

    @property
    def words(self) -> Tensor:
        """The values as words, int64 (OUT, words of a padded row)."""
        return self.values.view(torch.int64)


def pack_quantized(parts: Sequence[QuantizedWeight]) -> FusedWeight:
    """Concatenate alike weights in PLAIN order (`is_alike`) into one in ORDER.

    Raises ValueError for another order, for groups that are not of GROUPS columns, and for int4 without offsets.
    """
    if any(part.order != PLAIN for part in parts):
        raise ValueError(f"only weights in the order {PLAIN!r} can be packed: unpack them first")
    weight = concatenated(parts)
    _check(weight)
    in_features = weight.shape[1]
    block = ROW_BLOCK if weight.scales.dtype == torch.float32 else weight.group_size
    bits = BITS[weight.format]
    padding = -in_features % block * bits // 8
    values = F.pad(weight.values.view(torch.uint8), (0, padding))
    scales, offsets = weight.scales, weight.offsets
    if offsets is not None:
        scales = torch.stack([scales, offsets], -1).view(torch.int32)[..., 0]
    return FusedWeight(
        weight.format,
        _ordered(values, block, bits),
        scales.contiguous(),
        has_zeros=weight.has_zeros,
        order=ORDER,
        in_features=in_features,
        scale_dtype=weight.scales.dtype,
    )


def rows_of(weight: FusedWeight, start: int, length: int) -> FusedWeight:
    """`length` rows of a packed weight from `start` on."""
    end = start + length
    return replace(weight, values=weight.values[start:end], scales=weight.scales[start:end])


def unpack_quantized(weight: QuantizedWeight, rows: Sequence[int]) -> tuple[QuantizedWeight, ...]:
    """The weights in PLAIN order, of the given numbers of rows, of which `pack_quantized` made one."""
    return split(plain(weight), rows)


def plain(weight: QuantizedWeight) -> QuantizedWeight:
    """A packed weight in PLAIN order. ValueError for one that `pack_quantized` did not make."""
    weight = checked(weight)
    bits = BITS[weight.format]
    values = _plainly_ordered(weight.values, weight.group or ROW_BLOCK, bits)
    values = values[:, : ceil_div(weight.in_features * bits, 8)].contiguous()
    scales, offsets = weight.scales, None
    if weight.format == "int4":
        scales, offsets = (half.contiguous() for half in scales[..., None].view(weight.scale_dtype).unbind(-1))
    return QuantizedWeight(
        weight.format,
        values.view(torch.int8) if weight.format == "int8" else values,
        scales,
        offsets,
        weight.has_zeros,
    )


def checked(weight: QuantizedWeight) -> FusedWeight:
    """The weight, if `pack_quantized` made it; else ValueError."""
    if not isinstance(weight, FusedWeight):
        raise ValueError(f"the fused kernels need a weight packed by fused.pack, got one in the order {weight.order!r}")
    return weight


def weight_dims(weight: FusedWeight) -> dict[str, Any]:
    """The kernels' constexpr dims of a weight."""
    return {
        "FORMAT": weight.format,
        "GROUPS": weight.shape[1] // weight.group if weight.group else 0,
        "BLOCK": weight.group or ROW_BLOCK,
        "SCALE_DTYPE": tl.bfloat16 if weight.scale_dtype == torch.bfloat16 else tl.float16,
        "HAS_ZEROS": weight.has_zeros,
    }


def uses_assembly(target: Target) -> bool:
    """Whether kernels for a GPU convert weights by NVIDIA's instructions."""
    return target.backend == "cuda" and not interpreting()


def _check(weight: QuantizedWeight) -> None:
    by_row = weight.scales.dtype == torch.float32
    if not by_row and weight.group_size not in GROUPS:
        raise ValueError(
            f"the fused kernels take a scale per row or groups of {', '.join(map(str, GROUPS))} columns, got groups of "
            f'{weight.group_size}: build with backend="reference"'
        )
    is_int4 = weight.format == "int4"
    if is_int4 is (weight.offsets is None) or (is_int4 and by_row) or (by_row and weight.scales.shape[1] > 1):
        offsets = "no offsets" if weight.offsets is None else "offsets"
        raise ValueError(
            "the fused kernels take int4 weights with 16-bit scales and offsets, others with 16-bit scales of groups "
            f"or float32 scales of rows, got {weight.format} with {weight.scales.dtype} scales and {offsets}: "
            'build with backend="reference"'
        )


def _ordered(values: Tensor, block: int, bits: int) -> Tensor:
    """uint8 (OUT, bytes of a padded row) in PLAIN order -> in ORDER."""
    rows = values.shape[0]
    if bits == 8:
        return values.view(rows, -1, 2, block // 8, RUN).transpose(2, 3).reshape(rows, -1)
    halves = unpack_int4(values).view(rows, -1, 2, 2, block // 16, RUN).transpose(3, 4)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(rows, -1)


def _plainly_ordered(values: Tensor, block: int, bits: int) -> Tensor:
    """The inverse of `_ordered`."""
    rows = values.shape[0]
    if bits == 8:
        return values.view(rows, -1, block // 8, 2, RUN).transpose(2, 3).reshape(rows, -1)
    words = values.view(rows, -1, block // 16, 2, RUN).transpose(2, 3)
    return pack_int4(torch.stack([words & 15, words >> 4], 2).reshape(rows, -1))
