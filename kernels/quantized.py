"""Weights in fewer bits: small integers or 8-bit floats, with a scale for each row or for each group of its columns.

    int8    w = scale · q                    q from -127 to 127
    fp8     w = scale · q                    q in e4m3: 1 sign, 4 exponent and 3 mantissa bits
    int4    w = scale · (q - zero)           q from 0 to 15
            w = scale · q + minimum

A product with x needs only q of each weight: scales multiply sums over a row or over a group, and zeros and minima
multiply the group's sum of x.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FORMATS = ("int8", "fp8", "int4")
BITS = {"int8": 8, "fp8": 8, "int4": 4}
PLAIN = "plain"
ELEMENTS_AT_ONCE = 2**22  # that are dequantised together, so that float32 copies stay small


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (OUT, IN) with G groups of IN / G columns.

    Attributes:
        format: one of FORMATS.
        values: int8 (OUT, IN); fp8: uint8 (OUT, IN), the bits; int4: uint8 (OUT, IN / 2), column 2i in the low half of
            byte i, column 2i + 1 in the high half.
        scales: (OUT, G): float32 for a scale per row, float16 or bfloat16 for groups, even if a row is one group.
        offsets: of int4, (OUT, G) in the dtype of the scales: zeros if `has_zeros`, else minima. None for others.
        has_zeros: which of the two the offsets are.
        order: the order of the values in a row: PLAIN, or a backend's own, by its name.
    """

    format: str
    values: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    has_zeros: bool = False
    order: str = PLAIN

    @property
    def shape(self) -> tuple[int, int]:
        """(OUT, IN)."""
        rows, width = self.values.shape
        return rows, width * 8 // BITS[self.format]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.values, self.scales, self.offsets) if tensor is not None)

    def to(self, device: torch.device) -> "QuantizedWeight":
        """The same weight on a device: itself if it is there, as for tensors."""
        return self if device == self.device else self.mapped(lambda one: one.to(device))

    def rows(self, start: int, length: int) -> "QuantizedWeight":
        """`length` rows from `start` on."""
        return self.mapped(lambda one: one[start : start + length])

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (OUT, IN), computed in float32 and rounded to the dtype. Order PLAIN."""
        if self.order != PLAIN:
            raise ValueError(f"a weight in the order {self.order!r} must be unpacked before it is dequantised")
        n_rows, width = self.shape
        result = torch.empty(n_rows, width, dtype=dtype, device=self.device)
        step = max(1, ELEMENTS_AT_ONCE // width)
        for begin in range(0, n_rows, step):
            part = self.rows(begin, step)
            result[begin : begin + step] = part._scaled()
        return result

    def _scaled(self) -> Tensor:
        """The weight in float32."""
        q = self.values.view(torch.float8_e4m3fn) if self.format == "fp8" else self.values
        q = (unpack_int4(q) if self.format == "int4" else q).float().view(q.shape[0], self.scales.shape[1], -1)
        scales = self.scales.float()[..., None]
        if self.offsets is None:
            return (q * scales).flatten(1)
        offsets = self.offsets.float()[..., None]
        return ((q - offsets) * scales if self.has_zeros else q * scales + offsets).flatten(1)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "QuantizedWeight":
        """The weight with a function applied to each of its tensors."""
        return replace(
            self,
            values=change(self.values),
            scales=change(self.scales),
            offsets=None if self.offsets is None else change(self.offsets),
        )


Weight = Tensor | QuantizedWeight


def concatenated(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of several weights, which have the same columns, groups and kinds of tensors, as one, contiguous."""
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return replace(
        parts[0],
        values=torch.cat([part.values for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        offsets=torch.cat(offsets) if offsets else None,
    )


def split(weight: QuantizedWeight, rows: Sequence[int]) -> tuple[QuantizedWeight, ...]:
    """The weights of which `concatenated` made one."""
    starts = [sum(rows[:index]) for index in range(len(rows))]
    return tuple(weight.rows(start, length) for start, length in zip(starts, rows, strict=True))


def pack_int4(q: Tensor) -> Tensor:
    """(…, IN) numbers from 0 to 15 -> (…, IN / 2) uint8."""
    q = q.to(torch.uint8)
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_int4(values: Tensor) -> Tensor:
    """(…, IN / 2) uint8 -> (…, IN) uint8, numbers from 0 to 15."""
    return torch.stack([values & 15, values >> 4], -1).flatten(-2)
