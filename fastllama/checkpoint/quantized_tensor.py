"""Quantised matrices in files of any format: `narrow` reads a slice as a QuantizedWeight, in the order PLAIN."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from fastllama.checkpoint.json_config import short_list
from fastllama.checkpoint.sharding import ShardedTensor, WeightSpec
from fastllama.kernels.quantized import BITS, QuantizedWeight, Weight
from fastllama.quantization import INT4_GROUPS, Scheme

USE_ORIGINAL = "use the original weights, with --quantize for fewer bits"
# safetensors' names of dtypes.
FLOAT_DTYPES = ("F16", "BF16", "F32")
WORD_DTYPES = ("I32",)
WORD_BITS = 32
INT4_IN_WORD = 8
MAX_SCALE_ERROR = 0.01  # relative, of a scale that is rounded to float16

PartRule = tuple[tuple[int, ...], tuple[str, ...]]  # a shape, and the dtypes that it may have


class Part(Protocol):
    """A tensor in a file, before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def stored_dtype(self) -> str: ...


class QuantizedTensor(ABC):
    """A quantised matrix in a file. Only headers are read until `narrow` is called.

    Attributes:
        label: the file or folder and the matrix, for the messages of errors.
        shape: (OUT, IN).
        format: QuantizedWeight's.
        group_size: columns that share a scale; 0 is a scale per row.
        column_unit: a slice of columns begins and ends with a multiple of it.
        head_dim: if set, the rows are q's or k's in transformers' order, and `narrow` returns them in Meta's.
    """

    def __init__(
        self,
        label: str,
        shape: tuple[int, int],
        kind: str,
        stored_group: int,
        *,
        scale_dtype: str = "F16",
        has_zeros: bool = False,
        column_unit: int = 1,
    ) -> None:
        """stored_group: columns that share a scale in the file, 0 if all do; a long group's scale is repeated.

        scale_dtype: the file's, by safetensors' name.
        """
        self.label = label
        self.shape = shape
        self.format = kind
        self.group_size = (group_size_in_memory(stored_group) or stored_group) if stored_group else 0
        self.column_unit = math.lcm(self.group_size or 1, column_unit, 8 // BITS[kind])
        self._stored_group = stored_group
        self._has_zeros = has_zeros
        self._has_bfloat16_scales = bool(self.group_size) and scale_dtype == "BF16"
        self.head_dim: int | None = None

    def narrow(self, dim: int, start: int, length: int) -> QuantizedWeight:
        """`length` rows (`dim` 0) or columns (1) from `start` on. Columns must be whole units, permuted rows heads."""
        weight = self.read(dim, start, length)
        return weight if self.head_dim is None else in_meta_row_order(weight, self.head_dim)

    @abstractmethod
    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        """`narrow` in the file's order of rows."""

    def _by_group(
        self, block: Callable[[slice, slice], torch.Tensor], dim: int, start: int, length: int
    ) -> torch.Tensor:
        """What a file holds for each row and group, such as scales, for a slice -> (OUT, G), G of the memory's groups.

        block: reads it for ranges of rows and of the file's groups.
        """
        rows = slice(start, start + length) if dim == 0 else slice(0, self.shape[0])
        if not self.group_size:
            return block(rows, slice(0, 1))
        first, last = (0, self.shape[1]) if dim == 0 else (start, start + length)
        groups = slice(first // self._stored_group, -(-last // self._stored_group))
        repeated = block(rows, groups).repeat_interleave(self._stored_group // self.group_size, 1)
        begin = first % self._stored_group // self.group_size
        return repeated[:, begin : begin + (last - first) // self.group_size]

    def _scales_in_memory(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales as QuantizedWeight has them: float32 for rows, 16 bits for groups; float32 is rounded to float16.

        ValueError for scales that are not finite, and for those that float16 cannot hold.
        """
        self._check_finite(scales)
        if not self.group_size:
            return scales.float().contiguous()
        if scales.dtype != torch.float32:
            return scales.contiguous()
        half = scales.half()
        is_wrong = (half.float() - scales).abs() > MAX_SCALE_ERROR * scales.abs()
        if bool(is_wrong.any()):
            raise ValueError(
                f"{self.label} has scales of groups such as {float(scales[is_wrong][0]):.3g}, and float16, in which "
                f"they are kept, cannot hold this within {MAX_SCALE_ERROR:.0%}; {USE_ORIGINAL}"
            )
        return half.contiguous()

    def _check_finite(self, scales: torch.Tensor) -> None:
        """Raise ValueError for scales or minima that are infinite or not numbers."""
        if not bool(scales.isfinite().all()):
            raise ValueError(f"{self.label} has scales that are not finite; download the checkpoint again")

    @property
    def scheme(self) -> Scheme:
        """How what `narrow` returns is quantised."""
        return Scheme(self.format, self.group_size, self._has_zeros, self._has_bfloat16_scales)

    @property
    def description(self) -> str:
        """Such as "int4 in groups of 32"."""
        return f"{self.format} in groups of {self.group_size}" if self.group_size else f"{self.format} by row"

    @property
    def n_bytes(self) -> int:
        """The bytes of the weight as it is read."""
        rows, columns = self.shape
        per_scale = 2 if self.format == "int4" else 1  # with an offset
        n_scales, size = (rows * columns // self.group_size, 2) if self.group_size else (rows, 4)
        return rows * columns * BITS[self.format] // 8 + n_scales * size * per_scale


class DequantizedShard:
    """A quantised matrix as float32, dequantised when a slice is read. Slices of columns may cut groups."""

    dtype = torch.float32

    def __init__(self, tensor: QuantizedTensor) -> None:
        self._tensor = tensor
        self.shape = tensor.shape

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """`length` elements from `start` on axis `dim`."""
        unit = self._tensor.column_unit if dim == 1 else 1
        first, end = start // unit * unit, min(-(-(start + length) // unit) * unit, self.shape[dim])
        return self._tensor.narrow(dim, first, end - first).dequantized().narrow(dim, start - first, length)


def dense(weight: ShardedTensor | QuantizedTensor) -> ShardedTensor:
    """A weight as the files hold it, dequantised if it is quantised."""
    return weight if isinstance(weight, ShardedTensor) else ShardedTensor((DequantizedShard(weight),))


def check_parts(folder: Path, module: str, parts: Mapping[str, Part], expected: Mapping[str, PartRule]) -> None:
    """Raise ValueError unless the parts of a module have these shapes, and dtypes of safetensors' names."""
    if missing := [f"{module}.{name}" for name in expected if name not in parts]:
        raise ValueError(
            f"{folder}: config.json describes {short_list([module])} as quantised, and the files lack "
            f"{short_list(missing)}; download them again, or use the original weights"
        )
    for name, (shape, dtypes) in expected.items():
        part = parts[name]
        if tuple(part.shape) != tuple(shape) or part.stored_dtype not in dtypes:
            raise ValueError(
                f"{folder}: {short_list([f'{module}.{name}'])}: expected {' or '.join(dtypes)} {tuple(shape)} by "
                f"config.json, got {part.stored_dtype} {tuple(part.shape)}"
            )


def in_meta_row_order(weight: QuantizedWeight, head_dim: int) -> QuantizedWeight:
    """A weight of q or k, from transformers' order of rows to Meta's."""
    return weight.mapped(lambda rows: to_meta_row_order(rows, head_dim))


def in_transformers_row_order(weight: Weight, head_dim: int) -> Weight:
    """A weight or bias of q or k, from Meta's order of rows to transformers'."""
    if isinstance(weight, QuantizedWeight):
        return weight.mapped(lambda rows: to_transformers_row_order(rows, head_dim))
    return to_transformers_row_order(weight, head_dim)


def to_meta_row_order(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k (heads·D, E), from transformers' order (half after half) to Meta's (pair after pair).

    Also of their biases (heads·D,).
    """
    n_heads = rows.shape[0] // head_dim
    return rows.reshape(n_heads, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def to_transformers_row_order(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `to_meta_row_order`."""
    n_heads = rows.shape[0] // head_dim
    return rows.reshape(n_heads, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def group_size_in_memory(stored: int) -> int | None:
    """The groups into which those of a file are read: the largest of INT4_GROUPS that divides them; None if none does.

    A longer group repeats its scale.
    """
    return next((size for size in INT4_GROUPS if stored % size == 0), None)


def cuts_groups(tensor: QuantizedTensor, spec: WeightSpec, world_size: int) -> bool:
    """Whether the slices of `world_size` processes would cut groups of columns."""
    return spec.split_axis == 1 and tensor.shape[1] // world_size % tensor.column_unit != 0
