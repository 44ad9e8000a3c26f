"""Opens GGUF files, llama.cpp's format, in one file or split into several.

The weights are Meta's under other names, and rows of q and k are in Meta's order. Matrices in the types of
`gguf_blocks` keep their bits. Other quantised weights, and the embedding, are dequantised to float32 when a slice is
read, through the package `gguf`, a few rows at a time. Only the slice's rows and blocks are read.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastllama.args import EMBEDDING_NAME, OUTPUT_NAME
from fastllama.checkpoint.base import (
    Checkpoint,
    StoredWeight,
    check_names,
    check_shapes,
    count_layers,
    file_sizes,
    read_first_bytes,
)
from fastllama.checkpoint.gguf_blocks import FORMATS as KEPT_TYPES
from fastllama.checkpoint.gguf_blocks import GgufBlocks
from fastllama.checkpoint.gguf_config import gguf_params
from fastllama.checkpoint.gguf_rope import ROPE_FACTORS_NAME, apply_factors
from fastllama.checkpoint.json_config import short_list
from fastllama.checkpoint.sharding import (
    BIAS_SUFFIX,
    ShardedTensor,
    rename,
    weight_names,
    weight_specs,
)
from fastllama.gguf_header import GgufHeader, TensorInfo, read_header, split_files

ROWS_AT_ONCE = 256  # dequantised together
# llama.cpp's names, by Meta's.
OUTER_NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
# The first bias of those that a model has or lacks together; the metadata does not say.
FIRST_BIASES = {"attention_bias": "attn_q", "mlp_bias": "ffn_gate"}
# The types that torch has. All others are dequantised to float32.
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class TensorType:
    """A type of tensors: its gguf.GGMLQuantizationType, and the elements and bytes of a block."""

    kind: Any
    block_size: int
    block_bytes: int

    @property
    def name(self) -> str:
        return str(self.kind.name)

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """The bytes of a tensor whose rows are whole blocks."""
        return math.prod(shape) // self.block_size * self.block_bytes


class GgufTensor:
    """A tensor in a mapped GGUF file. Nothing but the header is read until `narrow` is called."""

    def __init__(self, data: np.ndarray, info: TensorInfo, tensor_type: TensorType) -> None:
        """data: the file's bytes."""
        self.shape = info.shape
        self.type = tensor_type
        self.n_bytes = tensor_type.n_bytes(info.shape)
        self._dtype = TORCH_DTYPES.get(tensor_type.name)
        self._rows = data[info.offset : info.offset + self.n_bytes].reshape(math.prod(info.shape[:-1]), -1)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype or torch.float32

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """`length` elements from `start` on axis `dim`: a view of the mapped file, or a new tensor if quantised."""
        if self._dtype is not None:
            stored = torch.from_numpy(self._rows).view(self._dtype).view(self.shape)
            return stored.narrow(dim, start, length)
        if len(self.shape) > 1 and dim == 0:
            return self._dequantised(self._rows[start : start + length])
        size, n_bytes = self.type.block_size, self.type.block_bytes
        first, last = start // size, -(-(start + length) // size)
        part = self._dequantised(self._rows[:, first * n_bytes : last * n_bytes]).narrow(
            1, start - first * size, length
        )
        return part.view(-1) if len(self.shape) == 1 else part

    def blocks(self, label: str) -> GgufBlocks | None:
        """The same matrix with the file's bits; None for a vector and for types that do not keep them.

        label: the file and the tensor, for the messages of errors.
        """
        if len(self.shape) != 2 or self.type.name not in KEPT_TYPES:
            return None
        return GgufBlocks(label, self._rows, self.shape[1], self.type.name)

    def _dequantised(self, rows: np.ndarray) -> torch.Tensor:
        from gguf.quants import dequantize

        n_columns = rows.shape[1] // self.type.block_bytes * self.type.block_size
        result = np.empty((len(rows), n_columns), np.float32)
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            part = np.ascontiguousarray(rows[begin : begin + ROWS_AT_ONCE])
            with np.errstate(all="ignore"):  # damaged blocks give inf and nan, as in llama.cpp
                result[begin : begin + ROWS_AT_ONCE] = dequantize(part, self.type.kind)
        return torch.from_numpy(result)


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file, or in all files of a split model if `path` is one of them.

    ValueError if the package gguf is not installed or any check fails.
    """
    import_gguf(path)
    paths = split_files(path)
    headers = []
    for one in paths:
        read_first_bytes(one)
        headers.append(read_header(one))
    metadata = headers[0].metadata
    params = gguf_params(paths[0], metadata)
    tensors = _find_tensors(headers)
    _check_split(headers, len(tensors))
    factors = tensors.pop(ROPE_FACTORS_NAME, None)
    if factors is not None:
        params |= apply_factors(paths[0], params, factors.narrow(0, 0, factors.shape[0]).float())
    params |= {key: f"blk.0.{module}.bias" in tensors for key, module in FIRST_BIASES.items()}
    names = {name: rename(name, OUTER_NAMES, "blk", LAYER_NAMES) for name in weight_names(params)}
    params["tied_output"] = names[OUTPUT_NAME] not in tensors
    expected = [name for meta, name in names.items() if not (params["tied_output"] and meta == OUTPUT_NAME)]
    check_names(paths[0], expected, tensors, _name_hint(params["n_layers"], tensors))
    embedding = tensors[names[EMBEDDING_NAME]]
    if params["vocab_size"] == -1:
        params["vocab_size"] = embedding.shape[0]
    specs = [spec for spec in weight_specs(params) if names[spec.name] in tensors]
    shapes = {names[spec.name]: (spec.shape, tensors[names[spec.name]].shape) for spec in specs}
    check_shapes(paths[0], "the metadata requires", shapes)
    stored: dict[str, StoredWeight] = {}
    for spec in specs:
        tensor = tensors[names[spec.name]]
        kept = None if spec.name == EMBEDDING_NAME else tensor.blocks(f"{paths[0]}: {names[spec.name]}")
        stored[spec.name] = kept or ShardedTensor((tensor,))
    has_embedding_as_output = False
    if params["tied_output"] and (output := embedding.blocks(f"{paths[0]}: {names[EMBEDDING_NAME]}")):
        params["tied_output"], has_embedding_as_output = False, True
        stored[OUTPUT_NAME] = output
    return Checkpoint(
        path=path.parent,
        format="gguf",
        params=params,
        files=file_sizes(paths),
        dtype=ShardedTensor((embedding,)).dtype,
        stop_token_ids=(),  # the tokenizer in the file has them
        stored=stored,
        bytes_by_type=_bytes_by_type(tensors),
        has_embedding_as_output=has_embedding_as_output,
    )


def import_gguf(path: Path) -> Any:
    """The package gguf. ValueError that says how to install it if it is missing."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path}: reading a GGUF file needs a package, pip install fastllama[gguf]") from None
    return gguf


def _find_tensors(headers: list[GgufHeader]) -> dict[str, GgufTensor]:
    """Every tensor of the files by llama.cpp's name. ValueError for one that cannot be read."""
    tensors: dict[str, GgufTensor] = {}
    for header in headers:
        data = np.memmap(header.path, np.uint8, mode="c")  # writable, as torch wants it; the file never changes
        for name, info in header.tensors.items():
            if name in tensors:
                raise ValueError(f"{header.path}: the tensor {short_list([name])} is also in another file of the model")
            tensors[name] = GgufTensor(data, info, _checked_type(header, name, info))
    return tensors


@functools.cache
def _readable_type(number: int) -> TensorType | None:
    """The type of this number, None if the package gguf cannot dequantise it."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
        found = TensorType(kind, *gguf.GGML_QUANT_SIZES[kind])
        if found.name not in TORCH_DTYPES:
            gguf.quants.dequantize(np.zeros((1, found.block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return found


def _checked_type(header: GgufHeader, name: str, info: TensorInfo) -> TensorType:
    """The tensor's type. ValueError if it cannot be read, or the tensor is not completely in the file."""
    what = f"{header.path}: tensor {short_list([name])}"
    found = _readable_type(info.type_number)
    if found is None:
        names = {one.value: one.name for one in import_gguf(header.path).GGMLQuantizationType}
        raise ValueError(
            f"{what} has the type {names.get(info.type_number, info.type_number)}, which the package gguf does not "
            "dequantise; use a file of another quantisation, such as Q8_0, or update the package"
        )
    if not info.shape or 0 in info.shape or info.shape[-1] % found.block_size:
        raise ValueError(
            f"{what}: expected rows of whole blocks of {found.block_size} ({found.name}), got the shape {info.shape}"
        )
    end = info.offset + found.n_bytes(info.shape)
    if end > header.size:
        raise ValueError(
            f"{what} ends at byte {end}, and the file has {header.size}; it is truncated or damaged: download it again"
        )
    return found


def _check_split(headers: list[GgufHeader], n_tensors: int) -> None:
    """Raise ValueError unless the files of a split model are what their metadata says."""
    for number, header in enumerate(headers):
        stated = header.metadata.get("split.no", number), header.metadata.get("split.count", len(headers))
        if header.metadata.get("split.count") and stated != (number, len(headers)):
            raise ValueError(
                f"{header.path}: expected file {number + 1} of {len(headers)}, as its name says, but its metadata says "
                f"split.no={stated[0]!r:.40}, split.count={stated[1]!r:.40}; a split file must keep its name and be "
                "given with its others"
            )
    total = headers[0].metadata.get("split.tensors.count", n_tensors)
    if total != n_tensors:
        raise ValueError(
            f"{headers[0].path}: split.tensors.count is {total!r:.40}, and the files hold {n_tensors} tensors; "
            "they do not belong together, or one is damaged: download them again"
        )


def _name_hint(n_layers: int, found: Mapping[str, GgufTensor]) -> str:
    """A possible cause if the tensors' names are not those that the metadata requires; "" if none is known."""
    layers = count_layers([name.replace("blk.", "layers.", 1) for name in found])
    if layers not in (0, n_layers):
        return f"the metadata says block_count={n_layers}, the files have {layers} layers"
    if any(name.endswith(BIAS_SUFFIX) for name in found):
        return "all layers have the same biases: those of attn_q, attn_k, attn_v and attn_output, of all ffn, or both"
    return ""


def _bytes_by_type(tensors: Mapping[str, GgufTensor]) -> dict[str, int]:
    """The bytes of the tensors of each type, the largest first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.type.name] += tensor.n_bytes
    return dict(sizes.most_common())
