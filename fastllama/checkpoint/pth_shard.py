"""Loads one of Meta's `*.pth` shards, memory-mapped and checked.

A shard is a zip archive that torch maps, so opening reads only its pickled table of contents. torch's restricted
unpickler reads that table and executes no code from the file.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastllama.checkpoint.base import check_dtypes, dtype_name, read_first_bytes
from fastllama.checkpoint.json_config import short_list, short_repr

ZIP_SIGNATURE = b"PK\x03\x04"
# Buffers in some files. They follow from params.json, so they are not read.
ROPE_FREQS_NAME = "rope.freqs"
DERIVED_BUFFERS = re.compile(r"(.*\.)?(rope\.freqs|freqs_cis|freqs_cos|freqs_sin)")


@dataclass(frozen=True)
class Shard:
    """One file's tensors by Meta's names.

    saved_as: the file's name without suffix when torch.save wrote it, as recorded in the archive.
    rope_freqs: the file's rope.freqs, if any. It is compared with the configuration, but not used.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    saved_as: str
    rope_freqs: torch.Tensor | None


def load_shard(path: Path) -> Shard:
    """One file's tensors, mapped and checked one by one, without derived buffers."""
    if read_first_bytes(path)[: len(ZIP_SIGNATURE)] != ZIP_SIGNATURE:
        raise ValueError(
            f"{path}: is not a zip archive as torch.save writes them; if it is a file of torch before 1.6, "
            "save it again: torch.save(torch.load(path, weights_only=True), path)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the checks below raise errors for what torch only warns of
            content: Any = None if compressed else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and zipfile raise a dozen types for a damaged or hostile file
        raise ValueError(f"{path}: {_explain(error)}") from error
    if compressed:  # torch maps the stored bytes and would read compressed bytes as numbers
        raise ValueError(f"{path}: its entries are compressed and cannot be mapped; pack it without compression")
    tensors = _check_tensors(path, content)
    return Shard(path, tensors, entries[0].filename.split("/")[0], content.get(ROPE_FREQS_NAME))


def _check_tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """The weights in a file's content. ValueError unless it is a flat dict of dense tensors of readable dtypes."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of names and tensors, got a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: expected a flat dict of names and tensors, "
                f"got {short_repr(name)} with a {type(value).__name__}; save the weights alone"
            )
    tensors = {name: value.detach() for name, value in content.items() if not DERIVED_BUFFERS.fullmatch(name)}
    check_dtypes(path, {name: dtype_name(value.dtype) for name, value in tensors.items()})
    without_data = [
        f"{name} {tuple(value.shape)}"
        for name, value in tensors.items()
        if value.layout != torch.strided or value.device.type != "cpu" or not value.numel()
    ]
    if without_data:
        raise ValueError(f"{path}: expected dense tensors with data, got none in {short_list(without_data)}")
    return tensors


def _explain(error: Exception) -> str:
    """The end of an error message about a file that torch or zipfile could not load."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        wanted = re.search(r"GLOBAL (\S{1,80})", text)
        what = f" ({wanted[1]})" if wanted else ""
        return (
            f"refused, because it holds more than tensors{what} and nothing in it is executed; "
            "save the tensors alone: torch.save(model.state_dict(), path)"
        )
    reason = f"{type(error).__name__}: {short_repr(text.splitlines()[0] if text else '')}"
    return f"is truncated or damaged ({reason}); download it again"


def check_same_tensors(shards: Sequence[Shard]) -> None:
    """Raise ValueError unless all shards hold the same names with the same shapes and dtypes."""
    first_shard, *others = shards
    first = first_shard.tensors
    for other in others:
        tensors = other.tensors
        if tensors.keys() != first.keys():
            names = short_list(sorted(tensors.keys() ^ first.keys()))
            raise ValueError(
                f"{other.path}: expected the same tensors as in {first_shard.path.name}, they differ in {names}"
            )
        differ_in = [
            f"{name}: {tuple(first[name].shape)} {first[name].dtype} there, {tuple(value.shape)} {value.dtype} here"
            for name, value in tensors.items()
            if value.shape != first[name].shape or value.dtype != first[name].dtype
        ]
        if differ_in:
            raise ValueError(
                f"{other.path}: expected the same shapes as in {first_shard.path.name}, got {short_list(differ_in)}"
            )
