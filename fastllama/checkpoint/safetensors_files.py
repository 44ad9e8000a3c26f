"""Finds the tensors of a Hugging Face folder: chooses safetensors files, checks the index, lists tensors by name."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastllama.checkpoint.base import dtype_name, read_first_bytes
from fastllama.checkpoint.json_config import JsonConfig, short_list, short_repr
from fastllama.checkpoint.quantized_tensor import to_meta_row_order
from fastllama.checkpoint.weight_files import WeightFiles, choose_numbered_set, huggingface_files

SINGLE_FILE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Buffers in some files: tables of the rotary embedding and causal masks. They follow from config.json.
DERIVED_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.[^.]+|masked_bias|causal_mask|position_ids)")
INV_FREQ_NAME = "rotary_emb.inv_freq"
CAUSAL_MASK = re.compile(r".*(self_attn|attention|attn)\.bias")
MASK_DIMS = 4
BASE_PREFIX = "model."
OUTPUT_NAME = "lm_head.weight"
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class SafetensorsTensor:
    """A tensor in a safetensors file. Only its header is read until `narrow` or `read` is called.

    If `head_dim` is set, the rows are q's or k's in transformers' order, and `narrow` returns them in Meta's order.
    """

    def __init__(self, handle: Any, name: str) -> None:
        self._slice = handle.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
        self.stored_dtype: str = self._slice.get_dtype()
        self.head_dim: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return SAFETENSORS_DTYPES[self.stored_dtype]

    @property
    def dtype_text(self) -> str:
        """torch's name of the dtype, or the stored one unchanged if torch's is not known here."""
        known = SAFETENSORS_DTYPES.get(self.stored_dtype)
        return dtype_name(known) if known else self.stored_dtype

    def read(self) -> torch.Tensor:
        """The complete tensor in the stored dtype and row order."""
        tensor: torch.Tensor = self._slice[:] if self.shape else self._slice[...]
        return tensor

    def block(self, rows: slice, columns: slice) -> torch.Tensor:
        """A part of a matrix, in the stored dtype and row order."""
        part: torch.Tensor = self._slice[rows, columns]
        return part

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """`length` elements from `start` on axis `dim`. Permuted rows must be cut at heads."""
        wanted = slice(start, start + length)
        part: torch.Tensor = self._slice[wanted] if dim == 0 else self._slice[:, wanted]
        return part if self.head_dim is None else to_meta_row_order(part, self.head_dim)


def find_tensors(
    folder: Path, config: JsonConfig, expected: Collection[str], tied: bool
) -> tuple[WeightFiles, dict[str, SafetensorsTensor], SafetensorsTensor | None]:
    """The files, every tensor in them by transformers' name, and one inv_freq if there is any.

    `expected` are the names of the complete model. Derived buffers are left out.
    """
    files, index, listed = _choose_files(folder, config)
    tensors: dict[str, SafetensorsTensor] = {}
    frequencies: SafetensorsTensor | None = None
    stored_names: dict[str, str] = {}
    file_of: dict[str, str] = {}
    for path in files.chosen:
        handle = open_safetensors(path)
        for name in handle.keys():  # noqa: SIM118 (the handle is no dict)
            tensor = SafetensorsTensor(handle, name)
            if _is_derived(name, tensor.shape):
                if name.endswith(INV_FREQ_NAME) and 0 not in tensor.shape:
                    frequencies = frequencies or tensor
                continue
            if name in file_of:
                raise ValueError(
                    f"{path}: {short_repr(name)} is also in {file_of[name]}; remove the file that is not wanted"
                )
            file_of[name] = path.name
            known = _add_or_remove_prefix(name, expected)
            if known in tensors:
                raise ValueError(
                    f"{path}: {short_repr(name)} and {short_repr(stored_names[known])} are names of the same tensor"
                )
            tensors[known], stored_names[known] = tensor, name
    if listed is not None:
        _check_index(index, listed, file_of, tied)
    empty = [f"{name} {tensor.shape}" for name, tensor in tensors.items() if 0 in tensor.shape]
    if empty:
        raise ValueError(f"{folder}: expected tensors with data, got none in {short_list(empty)}")
    return files, tensors, frequencies


def _choose_files(folder: Path, config: JsonConfig) -> tuple[WeightFiles, Path, dict[str, str] | None]:
    """(files to read, path of the index, the index's weight map, or None if there is no index).

    As in transformers, the file that config.json names goes first, then model.safetensors, then the index.
    """
    files = huggingface_files(folder)
    named = config.values.get("transformers_weights")
    if named is not None and not (isinstance(named, str) and Path(named).name == named and SUFFIX in named):
        raise config.error("transformers_weights", f"the name of a {SUFFIX} file in the same folder, or of its index")
    for name in [named] if named else [SINGLE_FILE_NAME, INDEX_NAME]:
        path = folder / name
        if not named and not os.path.isfile(path):
            continue
        if name.endswith(SUFFIX):
            files.keep_only([path], f"{name} goes first")
            return files, path, None
        listed = _read_index(path)
        files.keep_only([folder / file for file in sorted(set(listed.values()))], f"not in {name}")
        return files, path, listed
    choose_numbered_set(folder, files)
    return files, folder, None


def _is_derived(name: str, shape: tuple[int, ...] | None = None) -> bool:
    """Whether a tensor is a buffer that is not read. Without a shape, the name alone decides."""
    is_mask = CAUSAL_MASK.fullmatch(name) and (shape is None or len(shape) == MASK_DIMS)
    return bool(DERIVED_BUFFERS.fullmatch(name) or is_mask)


def _add_or_remove_prefix(name: str, expected: Collection[str]) -> str:
    """A tensor's name in the complete model. Files of the base model alone lack the prefix "model."."""
    for known in (name, BASE_PREFIX + name, name.removeprefix(BASE_PREFIX)):
        if known in expected:
            return known
    return name


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor. ValueError if the index is broken or one of its files is not in the folder."""
    config = JsonConfig.read(path)
    weight_map = config.section("weight_map")
    if weight_map is None:
        raise config.error("weight_map", "an object from tensor to file")
    listed = weight_map.values
    # Only plain names, because an index must not lead to files outside its folder.
    invalid = [key for key, file in listed.items() if not isinstance(file, str) or Path(file).name != file or not file]
    if invalid:
        raise weight_map.error(invalid[0], "the name of a file in the same folder")
    missing = sorted(file for file in set(listed.values()) if not os.path.exists(path.parent / file))
    if missing:
        raise ValueError(f"{path}: files are missing from the folder: {short_list(missing)}; download them")
    return listed


def _check_index(path: Path, listed: dict[str, str], file_of: dict[str, str], tied: bool) -> None:
    """Raise ValueError unless the files hold exactly what the index lists. `file_of` is the file of every weight found.

    As in transformers, derived buffers and a tied output may be listed without being stored.
    """
    optional = {name for name in listed if _is_derived(name)}
    if tied:
        optional |= {OUTPUT_NAME} - file_of.keys()
    absent = [
        f"{name} in {file}" for name, file in listed.items() if file_of.get(name) != file and name not in optional
    ]
    extra = [f"{name} in {file}" for name, file in file_of.items() if name not in listed]
    if absent:
        raise ValueError(f"{path}: lists {len(absent)} tensors that are not there: {short_list(absent)}")
    if extra:
        raise ValueError(f"{path}: does not list {len(extra)} tensors that are there: {short_list(extra)}")


def open_safetensors(path: Path) -> Any:
    """A handle of a safetensors file. ValueError if it is missing, truncated or damaged."""
    read_first_bytes(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # safetensors' own exception type, and OSError, for a damaged file
        raise ValueError(f"{path}: is truncated or damaged ({short_repr(str(error))}); download it again") from error
