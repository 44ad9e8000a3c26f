"""The header of a GGUF file, llama.cpp's format: metadata, and the place of every tensor.

A file is: "GGUF", version, counts; (key, type, value) of every field of the metadata; (name, dims, type, offset) of
every tensor; padding; the tensors' data. Numbers are little-endian. A model may be split into several files, each with
a header of its own; the first has the metadata.
"""

import mmap
import os
import re
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GGUF_MAGIC = b"GGUF"
GGUF_SUFFIX = ".gguf"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
ALIGNMENT_UNIT = 8  # an alignment is a multiple of it
MAX_DIMS = 4
MAX_ARRAY_LENGTH = 2**24  # far above any vocabulary
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})\.gguf")

# struct's formats of the types of metadata, by GGUF's numbers.
NUMBER_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's description: its shape in torch's order of axes, and its offset in bytes from the file's begin."""

    shape: tuple[int, ...]
    type_number: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """The content of a header: metadata by key, tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    size: int


def read_header(path: Path) -> GgufHeader:
    """The header of a file. ValueError, with the file and the reason, if it is not a GGUF file or is damaged."""
    try:
        with path.open("rb") as file:
            start = file.read(len(GGUF_MAGIC))
            if start != GGUF_MAGIC:
                raise ValueError(f"{path}: expected a GGUF file, got one that begins with {start!r}; download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def is_gguf_file(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name or its first bytes: in Ollama's store it has no suffix."""
    if not os.path.isfile(path):  # unlike Path.is_file, false for any string
        return False
    if path.suffix == GGUF_SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def gguf_models(folder: Path) -> list[Path]:
    """The first file of every GGUF model in a folder, hidden files left out, sorted by name."""
    files = sorted(path for path in folder.glob(f"[!.]*{GGUF_SUFFIX}") if path.is_file())
    by_model: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        match = SPLIT_NAME.fullmatch(path.name)
        by_model[f"{match['stem']}-of-{match['total']}" if match else path.name].append(path)
    return [paths[0] for paths in by_model.values()]


def split_files(path: Path) -> list[Path]:
    """All files of the model that `path` is a file of, in their order. ValueError if one is missing."""
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    total = int(match["total"])
    if not 1 <= int(match["number"]) <= total:
        raise ValueError(f"{path}: expected a number from 1 to {total} in the name, got {int(match['number'])}")
    names = [f"{match['stem']}-{number:05d}-of-{match['total']}{GGUF_SUFFIX}" for number in range(1, total + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{path}: the model has {total} files, and {missing[0]}{more} is not beside it; download it")
    return [path.parent / name for name in names]


class _Reader:
    """Reads values one after the other. Every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._position = len(GGUF_MAGIC)

    def header(self) -> GgufHeader:
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            what = "a big-endian file" if swapped in VERSIONS else f"version {version}"
            raise ValueError(f"{self._path}: expected GGUF version 2 or 3, little-endian, got {what}; convert it again")
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"has the field {key[:80]!r} twice")
            metadata[key] = self._value(self._number("I"))
        tensors: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            name = self._string()
            if name in tensors:
                raise self._damaged(f"has the tensor {name[:80]!r} twice")
            tensors[name] = self._tensor(name)
        return GgufHeader(self._path, metadata, self._placed(metadata, tensors), len(self._data))

    def _placed(self, metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors with offsets from the file's begin."""
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < ALIGNMENT_UNIT or alignment % ALIGNMENT_UNIT:
            raise self._damaged(f"has {ALIGNMENT_KEY}={alignment!r:.80}, expected a multiple of {ALIGNMENT_UNIT}")
        begin = -(-self._position // alignment) * alignment
        for name, tensor in tensors.items():
            if tensor.offset % alignment:
                raise self._damaged(
                    f"tensor {name[:80]!r} begins at {tensor.offset}, expected a multiple of {alignment}"
                )
        return {name: TensorInfo(one.shape, one.type_number, begin + one.offset) for name, one in tensors.items()}

    def _tensor(self, name: str) -> TensorInfo:
        n_dims = self._number("I")
        if n_dims > MAX_DIMS:
            raise self._damaged(f"tensor {name[:80]!r} has {n_dims} dimensions, expected {MAX_DIMS} at most")
        dims = [self._number("Q") for _ in range(n_dims)]
        return TensorInfo(tuple(reversed(dims)), self._number("I"), self._number("Q"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array()
        return self._number(self._format(kind))

    def _array(self) -> list[Any]:
        kind, length = self._number("I"), self._number("Q")
        if length > MAX_ARRAY_LENGTH:
            raise self._damaged(f"has an array of {length} values, expected {MAX_ARRAY_LENGTH} at most")
        if kind == STRING:
            return [self._string() for _ in range(length)]
        layout = f"<{length}{self._format(kind)}"
        return list(struct.unpack(layout, self._bytes(struct.calcsize(layout))))

    def _format(self, kind: int) -> str:
        if kind not in NUMBER_FORMATS:
            raise self._damaged(f"has a value of the unknown type {kind}")
        return NUMBER_FORMATS[kind]

    def _number(self, kind: str) -> Any:
        layout = f"<{kind}"
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        data = self._bytes(self._number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"has a text that is not UTF-8, {data[:40]!r}") from None

    def _bytes(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise self._damaged("ends inside its header")
        part = self._data[self._position : end]
        self._position = end
        return part

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: {what}; the file is truncated or damaged: download it again")
