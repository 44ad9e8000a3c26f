"""Reads the weights that the package compressed-tensors writes. For a matrix (OUT, IN) with G groups of columns:

    weight             int8 or fp8 (OUT, IN), or instead
    weight_packed      int32 (OUT, IN · bits / 32), column 0 in the lowest bits, each number plus half the range
    weight_shape       (OUT, IN), beside weight_packed
    weight_scale       one number, (OUT,), (OUT, 1) or (OUT, G)
    weight_zero_point  int32 (OUT · bits / 32, G), packed along the rows; if the scheme is not symmetric. One that is
                       may have zeros in any form, but they must change nothing

The bytes of weight_packed are in the order of QuantizedWeight, so they are read as they are.
"""

import logging
import math
from pathlib import Path

import torch

from fastllama.checkpoint.base import check_shapes
from fastllama.checkpoint.compressed_tensors_config import CompressedTensorsConfig, WeightScheme
from fastllama.checkpoint.json_config import JsonConfig
from fastllama.checkpoint.quantized_tensor import (
    FLOAT_DTYPES,
    INT4_IN_WORD,
    USE_ORIGINAL,
    WORD_BITS,
    WORD_DTYPES,
    PartRule,
    QuantizedTensor,
    check_parts,
    group_size_in_memory,
)
from fastllama.checkpoint.safetensors_files import SafetensorsTensor
from fastllama.kernels.quantized import BITS, QuantizedWeight, unpack_int4

logger = logging.getLogger(__name__)

Parts = dict[str, SafetensorsTensor]

WEIGHT, PACKED, SHAPE, SCALE, ZERO = "weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point"
# Of static quantisation of activations, which stay in the model's dtype.
ACTIVATION_PARTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
FP8_MAGNITUDE = 0x7F  # the bits below the sign; all of them set is NaN
STORED_DTYPES = {"int8": "I8", "fp8": "F8_E4M3"}
SIGN_BIT = 0x80
MATRIX_DIMS = 2


class CompressedTensors:
    """The method of quantising that config.json calls compressed-tensors."""

    part_names = (PACKED, SHAPE, SCALE, ZERO, *ACTIVATION_PARTS)

    def __init__(self, config: JsonConfig) -> None:
        self._config = CompressedTensorsConfig(config)
        if self._config.quantizes_activations:
            logger.info(
                "%s: quantised activations are ignored; they stay in the dtype of the model", config.path.parent
            )

    def take(self, tensors: Parts, module: str) -> Parts:
        """Remove a module's parts from `tensors`, and return those that are read; {} if it is not quantised."""
        stored = [part for part in (WEIGHT, *self.part_names) if f"{module}.{part}" in tensors]
        if not stored or self._config.scheme_of(module) is None:  # matched only for modules that are in the files
            return {}
        taken = {part: tensors.pop(f"{module}.{part}") for part in stored}
        return {part: tensor for part, tensor in taken.items() if part not in ACTIVATION_PARTS}

    def tensor(self, folder: Path, module: str, parts: Parts, shape: tuple[int, int]) -> QuantizedTensor:
        """The matrix (OUT, IN) of a module. ValueError unless its parts are what its scheme requires."""
        scheme = self._config.scheme_of(module)
        assert scheme is not None
        _check_parts(folder, module, parts, scheme, shape)
        return CompressedTensor(f"{folder}: {module}", parts, scheme, shape)


def _check_parts(folder: Path, module: str, parts: Parts, scheme: WeightScheme, shape: tuple[int, int]) -> None:
    rows, columns = shape
    bits, group = BITS[scheme.format], scheme.group_size or columns
    if columns % group or (scheme.format == "int4" and group_size_in_memory(group) is None):
        raise ValueError(
            f"{folder}: {module}: expected columns in whole groups, of a multiple of 32, got {columns} columns in "
            f"groups of {group}"
        )
    n_groups = columns // group
    has_one_scale = SCALE in parts and parts[SCALE].shape in ((), (1,), (1, 1))
    scale_shape = parts[SCALE].shape if has_one_scale and not scheme.group_size else (rows, n_groups)
    if SCALE in parts and n_groups == 1 and parts[SCALE].shape == (rows,):
        scale_shape = (rows,)
    expected: dict[str, PartRule] = {SCALE: (scale_shape, FLOAT_DTYPES)}
    if scheme.is_packed:
        expected[PACKED] = (rows, -(-columns * bits // WORD_BITS)), WORD_DTYPES
        if SHAPE in parts:
            expected[SHAPE] = (2,), ("I64", *WORD_DTYPES)
    else:
        expected[WEIGHT] = shape, (STORED_DTYPES[scheme.format],)
    if not scheme.is_symmetric:
        expected[ZERO] = (-(-rows * bits // WORD_BITS), n_groups), WORD_DTYPES
    check_parts(folder, module, parts, expected)
    if scheme.is_symmetric and ZERO in parts and not _is_neutral(parts[ZERO], bits, rows):
        raise ValueError(
            f"{folder}: {module}: config.json describes the weights as symmetric, and the files hold a {ZERO} that "
            f"changes them; {USE_ORIGINAL}"
        )
    if SHAPE in parts:
        check_shapes(folder, "its weight_shape states", {module: (parts[SHAPE].read().tolist(), shape)})


def _is_neutral(zero: SafetensorsTensor, bits: int, rows: int) -> bool:
    """Whether stored zero points are those of a symmetric scheme: in packed words half the range, else 0."""
    stored = zero.read()
    if stored.dtype != torch.int32 or stored.ndim != MATRIX_DIMS or len(stored) != -(-rows * bits // WORD_BITS):
        return not bool(stored.float().any())
    words = stored.T.contiguous().view(torch.uint8)
    numbers = (unpack_int4(words) if bits == BITS["int4"] else words)[:, :rows]
    return bool((numbers == 1 << (bits - 1)).all())


class CompressedTensor(QuantizedTensor):
    """A weight of compressed-tensors."""

    def __init__(self, label: str, parts: Parts, scheme: WeightScheme, shape: tuple[int, int]) -> None:
        self._parts = parts
        self._scheme = scheme
        stored_group = scheme.group_size or (shape[1] if scheme.format == "int4" else 0)
        per_word = WORD_BITS // BITS[scheme.format] if scheme.is_packed else 1
        super().__init__(
            label,
            shape,
            scheme.format,
            stored_group,
            scale_dtype=parts[SCALE].stored_dtype,
            has_zeros=scheme.format == "int4",
            column_unit=per_word,
        )

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        scales = self._scales_in_memory(self._by_group(self._scales, dim, start, length))
        if self.format != "int4":
            return QuantizedWeight(self.format, self._values(dim, start, length), scales)
        if self._scheme.is_symmetric:
            zeros = torch.full_like(scales, 1 << (BITS["int4"] - 1))
        else:
            zeros = self._by_group(self._zeros, dim, start, length).to(scales.dtype).contiguous()
        return QuantizedWeight(self.format, self._values(dim, start, length), scales, zeros, has_zeros=True)

    def _values(self, dim: int, start: int, length: int) -> torch.Tensor:
        if not self._scheme.is_packed:
            values = self._parts[WEIGHT].narrow(dim, start, length)
            return self._checked_bits(values.view(torch.uint8)) if self.format == "fp8" else values
        packed, columns = self._parts[PACKED], length if dim == 1 else self.shape[1]
        if dim == 1:
            per_word = WORD_BITS // BITS[self.format]
            start, length = start // per_word, -(-length // per_word)
        values = packed.narrow(dim, start, length).view(torch.uint8)
        if self.format == "int4":
            return values
        return values[:, :columns].bitwise_xor(SIGN_BIT).view(torch.int8)

    def _checked_bits(self, bits: torch.Tensor) -> torch.Tensor:
        """The bits of e4m3 numbers. ValueError for NaN, which the kernels would read as a number."""
        if bool((bits.bitwise_and(FP8_MAGNITUDE) == FP8_MAGNITUDE).any()):
            raise ValueError(
                f"{self.label} holds fp8 weights that are not numbers (NaN); download the checkpoint again"
            )
        return bits

    def _scales(self, rows: slice, groups: slice) -> torch.Tensor:
        stored = self._parts[SCALE]
        if math.prod(stored.shape) == 1:
            return stored.read().reshape(1, 1).expand(rows.stop - rows.start, 1)
        return stored.block(rows, groups) if len(stored.shape) > 1 else stored.read()[rows, None]

    def _zeros(self, rows: slice, groups: slice) -> torch.Tensor:
        """The zeros of some rows, from words that each hold those of 8 rows."""
        first, last = rows.start // INT4_IN_WORD, -(-rows.stop // INT4_IN_WORD)
        words = self._parts[ZERO].block(slice(first, last), groups).contiguous()
        in_words = unpack_int4(words.view(torch.uint8).view(*words.shape, -1))  # (words, groups, 8)
        begin = first * INT4_IN_WORD
        return in_words.transpose(1, 2).flatten(0, 1)[rows.start - begin : rows.stop - begin]
