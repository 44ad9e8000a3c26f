"""One `*.pth` of Meta's, mapped into memory and taken without trust.

A shard is a zip archive that torch maps, so opening reads only the pickled table of contents, and that through torch's
restricted unpickler, which never runs what a file brings along.
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

from fastllama.checkpoint.base import check_dtypes, dtype_name, read_start
from fastllama.checkpoint.json_config import listing, shown

ZIP_SIGNATURE = b"PK\x03\x04"
# Buffers that some files carry; they follow from the parameters.
FREQUENCIES = "rope.freqs"
DERIVED = re.compile(r"(.*\.)?(rope\.freqs|freqs_cis|freqs_cos|freqs_sin)")


@dataclass(frozen=True)
class Shard:
    """A file's tensors by Meta's names, and the name that the file had, without its suffix, when torch wrote it.

    `frequencies` is the file's rope.freqs, if it has such; nothing is computed from it.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    saved_as: str
    frequencies: torch.Tensor | None


def load_shard(path: Path) -> Shard:
    """One file's tensors, mapped and checked one by one, without those that are ignored."""
    if read_start(path)[: len(ZIP_SIGNATURE)] != ZIP_SIGNATURE:
        raise ValueError(
            f"{path}: is not a zip archive as torch.save writes them; if it is a file of torch before 1.6, "
            "save it again: torch.save(torch.load(path, weights_only=True), path)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of is checked below, and said as an error
            content: Any = None if compressed else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and zipfile raise a dozen types for a damaged or hostile file
        raise ValueError(f"{path}: {_reason(error)}") from error
    if compressed:  # mapping takes the bytes as they lie, so torch would read these as numbers
        raise ValueError(f"{path}: its entries are compressed and cannot be mapped; pack it without compression")
    tensors = _tensors(path, content)
    return Shard(path, tensors, entries[0].filename.split("/")[0], content.get(FREQUENCIES))


def _tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of names and tensors, got a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: expected a flat dict of names and tensors, got {shown(name)} with a {type(value).__name__}"
            )
    shard = {name: value.detach() for name, value in content.items() if not DERIVED.fullmatch(name)}
    check_dtypes(path, {name: dtype_name(value.dtype) for name, value in shard.items()})
    hollow = [
        f"{name} {tuple(value.shape)}"
        for name, value in shard.items()
        if value.layout != torch.strided or value.device.type != "cpu" or not value.numel()
    ]
    if hollow:
        raise ValueError(f"{path}: expected dense tensors with data, got none in {listing(hollow)}")
    return shard


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        wanted = re.search(r"GLOBAL (\S{1,80})", text)
        what = f" ({wanted[1]})" if wanted else ""
        return f"refused, because it holds more than tensors{what} and nothing in it is executed"
    said = f"{type(error).__name__}: {shown(text.splitlines()[0] if text else '')}"
    return f"is truncated or damaged ({said}); download it again"


def check_same_tensors(shards: Sequence[Shard]) -> None:
    """ValueError unless all shards hold the same names with the same shapes and dtypes."""
    one = shards[0]
    first = one.tensors
    for other in shards[1:]:
        shard = other.tensors
        if shard.keys() != first.keys():
            differ = listing(sorted(shard.keys() ^ first.keys()))
            raise ValueError(f"{other.path}: expected the same tensors as in {one.path.name}, they differ in {differ}")
        differ_in = [
            f"{name}: {tuple(first[name].shape)} {first[name].dtype} there, {tuple(value.shape)} {value.dtype} here"
            for name, value in shard.items()
            if value.shape != first[name].shape or value.dtype != first[name].dtype
        ]
        if differ_in:
            raise ValueError(f"{other.path}: expected the same shapes as in {one.path.name}, got {listing(differ_in)}")
