"""Reads int4 weights as GPTQ's and AWQ's programs store them, transposed and in 32-bit words.

For a matrix (OUT, IN) with G groups of columns; a word holds 8 numbers, the first in the lowest bits:

    GPTQ   qweight (IN / 8, OUT)   qzeros (G, OUT / 8)   scales (G, OUT)   g_idx (IN,), the group of each column
    AWQ    qweight (IN, OUT / 8)   qzeros (G, OUT / 8)   scales (G, OUT)

    w = scale · (q - zero). GPTQ's first format stores zero - 1, modulo 16. AWQ's words hold their numbers in the order
    0, 2, 4, 6, 1, 3, 5, 7.
"""

from pathlib import Path

import torch

from fastllama.checkpoint.json_config import JsonConfig, short_list
from fastllama.checkpoint.quantized_tensor import (
    FLOAT_DTYPES,
    INT4_IN_WORD,
    USE_ORIGINAL,
    WORD_DTYPES,
    PartRule,
    QuantizedTensor,
    check_parts,
    group_size_in_memory,
)
from fastllama.checkpoint.safetensors_files import SafetensorsTensor
from fastllama.kernels.quantized import QuantizedWeight, pack_int4, unpack_int4

Parts = dict[str, SafetensorsTensor]

QWEIGHT, QZEROS, SCALES, GROUP_INDEX = "qweight", "qzeros", "scales", "g_idx"
ONE_GROUP = -1
INT4_MASK = 15
GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # and what is added to a stored zero
# Where AWQ's word has numbers 0 to 7.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
WORDS_AT_ONCE = 64  # columns of AWQ's words that are unpacked together


def _error(config: JsonConfig, key: str, expected: str) -> ValueError:
    return ValueError(f"{config.error(key, expected)}; {USE_ORIGINAL}")


def _stored_group(config: JsonConfig) -> int:
    """Columns that share a scale; 0 if all do. ValueError unless the weights have 4 bits."""
    bits = next((key for key in ("bits", "w_bit") if config.has(key)), "bits")
    if config.values.get(bits) != 4:
        raise _error(config, bits, "4")
    key = next((key for key in ("group_size", "q_group_size") if config.has(key)), "group_size")
    if config.values.get(key) == ONE_GROUP:
        return 0
    group_size = config.integer(key, 128)
    if group_size_in_memory(group_size) is None:
        raise _error(config, key, "a multiple of 32, or -1")
    return group_size


def take_parts(tensors: Parts, module: str, names: tuple[str, ...]) -> Parts:
    """Remove these parts of a module from `tensors`, and return those that are there."""
    return {part: tensors.pop(f"{module}.{part}") for part in names if f"{module}.{part}" in tensors}


class Gptq:
    """The method of quantising that config.json calls gptq."""

    part_names: tuple[str, ...] = (QWEIGHT, QZEROS, SCALES, GROUP_INDEX)

    def __init__(self, config: JsonConfig) -> None:
        self._group = _stored_group(config)
        key = "checkpoint_format" if config.has("checkpoint_format") else "format"
        name = config.values.get(key) or "gptq"
        if not isinstance(name, str) or name not in GPTQ_FORMATS:
            raise _error(config, key, f"one of {', '.join(GPTQ_FORMATS)}")
        if config.values.get("dynamic"):
            raise _error(config, "dynamic", "null: all modules are quantised alike")
        self._zero_shift = GPTQ_FORMATS[name]
        self._may_be_reordered = config.flag("desc_act")

    def take(self, tensors: Parts, module: str) -> Parts:
        """Remove a module's parts from `tensors`, and return them; {} if it is not quantised."""
        return take_parts(tensors, module, self.part_names)

    def tensor(self, folder: Path, module: str, parts: Parts, shape: tuple[int, int]) -> QuantizedTensor:
        """The matrix (OUT, IN) of a module. ValueError for parts of other shapes, or columns in another order."""
        rows, columns = shape
        group = self._group or columns
        expected = _expected_parts(folder, module, shape, group)
        expected[QWEIGHT] = (columns // INT4_IN_WORD, rows), WORD_DTYPES
        if GROUP_INDEX in parts or self._may_be_reordered:
            expected[GROUP_INDEX] = (columns,), WORD_DTYPES
        check_parts(folder, module, parts, expected)
        if GROUP_INDEX in parts:
            index = parts[GROUP_INDEX].read()
            if not torch.equal(index, torch.arange(columns, dtype=index.dtype) // group):
                raise ValueError(
                    f"{folder}: {short_list([module])} has its columns in an order of their own (act-order, desc_act), "
                    f"which is not read here; take one quantised with desc_act=false, or {USE_ORIGINAL}"
                )
        return GptqTensor(f"{folder}: {module}", parts, shape, group, self._zero_shift)


class Awq:
    """The method of quantising that config.json calls awq."""

    part_names: tuple[str, ...] = (QWEIGHT, QZEROS, SCALES)

    def __init__(self, config: JsonConfig) -> None:
        self._group = _stored_group(config)
        key = "version" if config.has("version") else "format"
        version = config.values.get(key) or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise _error(config, key, "'gemm'")
        if not config.flag("zero_point", True):
            raise _error(config, "zero_point", "true")

    def take(self, tensors: Parts, module: str) -> Parts:
        """Remove a module's parts from `tensors`, and return them; {} if it is not quantised."""
        return take_parts(tensors, module, self.part_names)

    def tensor(self, folder: Path, module: str, parts: Parts, shape: tuple[int, int]) -> QuantizedTensor:
        """The matrix (OUT, IN) of a module. ValueError for parts of other shapes."""
        rows, columns = shape
        group = self._group or columns
        expected = _expected_parts(folder, module, shape, group)
        expected[QWEIGHT] = (columns, rows // INT4_IN_WORD), WORD_DTYPES
        check_parts(folder, module, parts, expected)
        return AwqTensor(f"{folder}: {module}", parts, shape, group)


def _expected_parts(folder: Path, module: str, shape: tuple[int, int], group: int) -> dict[str, PartRule]:
    """Zeros and scales. ValueError unless the matrix has whole groups and words."""
    rows, columns = shape
    if rows % INT4_IN_WORD or columns % group or group_size_in_memory(group) is None:
        raise ValueError(
            f"{folder}: {short_list([module])}: expected rows that are a multiple of {INT4_IN_WORD}, and columns in "
            f"whole groups, of a multiple of 32, got {shape} in groups of {group}"
        )
    n_groups = columns // group
    return {QZEROS: ((n_groups, rows // INT4_IN_WORD), WORD_DTYPES), SCALES: ((n_groups, rows), FLOAT_DTYPES)}


class GptqTensor(QuantizedTensor):
    """A weight of GPTQ."""

    def __init__(self, label: str, parts: Parts, shape: tuple[int, int], stored_group: int, zero_shift: int) -> None:
        scale_dtype = parts[SCALES].stored_dtype
        super().__init__(label, shape, "int4", stored_group, scale_dtype=scale_dtype, has_zeros=True)
        self._parts = parts
        self._zero_shift = zero_shift

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        scales = self._scales_in_memory(self._by_group(self._scales, dim, start, length))
        zeros = self._by_group(self._zeros, dim, start, length).to(scales.dtype).contiguous()
        return QuantizedWeight("int4", self._values(dim, start, length), scales, zeros, has_zeros=True)

    def _values(self, dim: int, start: int, length: int) -> torch.Tensor:
        """A word's bytes are those of QuantizedWeight: only the words of a row must lie beside each other."""
        if dim == 0:
            words = self._parts[QWEIGHT].narrow(1, start, length)
        else:
            words = self._parts[QWEIGHT].narrow(0, start // INT4_IN_WORD, length // INT4_IN_WORD)
        return words.T.contiguous().view(torch.uint8)

    def _scales(self, rows: slice, groups: slice) -> torch.Tensor:
        return self._parts[SCALES].block(groups, rows).T

    def _zeros(self, rows: slice, groups: slice) -> torch.Tensor:
        first, last = rows.start // INT4_IN_WORD, -(-rows.stop // INT4_IN_WORD)
        words = self._parts[QZEROS].block(groups, slice(first, last)).contiguous()
        begin = first * INT4_IN_WORD
        zeros = self._unpacked(words)[:, rows.start - begin : rows.stop - begin]
        return (zeros + self._zero_shift).bitwise_and(INT4_MASK).T

    def _unpacked(self, words: torch.Tensor) -> torch.Tensor:
        """(n, words) -> (n, 8 · words) uint8."""
        return unpack_int4(words.view(torch.uint8))


class AwqTensor(GptqTensor):
    """A weight of AWQ: words run along the rows, and have an order of their own."""

    def __init__(self, label: str, parts: Parts, shape: tuple[int, int], stored_group: int) -> None:
        super().__init__(label, parts, shape, stored_group, zero_shift=0)

    def _values(self, dim: int, start: int, length: int) -> torch.Tensor:
        rows = (start, start + length) if dim == 0 else (0, self.shape[0])
        columns = slice(start, start + length) if dim == 1 else slice(0, self.shape[1])
        values = torch.empty(rows[1] - rows[0], (columns.stop - columns.start) // 2, dtype=torch.uint8)
        for first in range(rows[0] // INT4_IN_WORD, -(-rows[1] // INT4_IN_WORD), WORDS_AT_ONCE):
            words = self._parts[QWEIGHT].block(columns, slice(first, first + WORDS_AT_ONCE)).contiguous()
            begin = first * INT4_IN_WORD
            low, high = max(rows[0], begin), min(rows[1], begin + words.shape[1] * INT4_IN_WORD)
            q = self._unpacked(words)[:, low - begin : high - begin]
            values[low - rows[0] : high - rows[0]] = pack_int4(q.T)
        return values

    def _unpacked(self, words: torch.Tensor) -> torch.Tensor:
        """(n, words) -> (n, 8 · words) uint8."""
        in_words = super()._unpacked(words).view(*words.shape, INT4_IN_WORD)
        return in_words[..., AWQ_PLACES].flatten(1)
