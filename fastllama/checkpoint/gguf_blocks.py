"""GGUF's blocks of 32 weights that keep their bits: Q8_0, Q4_0 and Q4_1 as groups of QuantizedWeight.

A block is a scale in float16, for Q4_1 also a minimum, and 32 numbers: int8, or 16 bytes whose low halves are the first
16 numbers and whose high halves the others.
"""

import numpy as np
import torch

from fastllama.checkpoint.quantized_tensor import QuantizedTensor
from fastllama.kernels.quantized import QuantizedWeight, pack_int4

BLOCK = 32
FORMATS = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}
SCALE_BYTES = 2
ZERO = 8  # of Q4_0
ROWS_AT_ONCE = 256  # whose numbers are put in order together


class GgufBlocks(QuantizedTensor):
    """A matrix in one of FORMATS."""

    def __init__(self, label: str, rows: np.ndarray, columns: int, kind: str) -> None:
        """rows: the bytes of the mapped file, (OUT, bytes of a row). kind: a key of FORMATS."""
        super().__init__(label, (len(rows), columns), FORMATS[kind], BLOCK, has_zeros=kind == "Q4_0")
        self._blocks = rows.reshape(len(rows), columns // BLOCK, -1)
        self._kind = kind

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        if dim == 0:
            blocks = self._blocks[start : start + length]
        else:
            blocks = self._blocks[:, start // BLOCK : (start + length) // BLOCK]
        scales = self._scales_in_memory(_floats(blocks, 0))
        if self._kind == "Q8_0":
            return QuantizedWeight("int8", _flat(blocks[:, :, SCALE_BYTES:]).view(torch.int8), scales)
        has_minima = self._kind == "Q4_1"
        offsets = _floats(blocks, SCALE_BYTES) if has_minima else torch.full_like(scales, ZERO)
        self._check_finite(offsets)
        numbers = blocks[:, :, (2 if has_minima else 1) * SCALE_BYTES :]
        return QuantizedWeight("int4", _in_order(numbers), scales, offsets, has_zeros=not has_minima)


def _floats(blocks: np.ndarray, first: int) -> torch.Tensor:
    """The float16 at byte `first` of each block."""
    return torch.from_numpy(np.ascontiguousarray(blocks[:, :, first : first + 2])).view(torch.float16)[:, :, 0]


def _flat(numbers: np.ndarray) -> torch.Tensor:
    """(OUT, G, n) -> (OUT, G · n), copied."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).flatten(1)


def _in_order(numbers: np.ndarray) -> torch.Tensor:
    """Bytes (OUT, G, 16) of numbers i and i + 16 -> (OUT, G · 16) of numbers 2i and 2i + 1."""
    result = torch.empty(len(numbers), numbers.shape[1] * numbers.shape[2], dtype=torch.uint8)
    for begin in range(0, len(numbers), ROWS_AT_ONCE):
        part = torch.from_numpy(np.ascontiguousarray(numbers[begin : begin + ROWS_AT_ONCE]))
        result[begin : begin + ROWS_AT_ONCE] = pack_int4(torch.cat([part & 15, part >> 4], -1)).flatten(1)
    return result
