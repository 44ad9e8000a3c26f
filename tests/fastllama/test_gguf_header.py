"""The header of a GGUF file: every type of value, against the package that wrote it, and what is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from fastllama.gguf_header import gguf_models, read_header, split_files

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")


def write(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 100)
    writer.add_int64("a.negative", -(2**40))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Straße")
    writer.add_array("a.strings", ["", "天", "x y"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_the_packages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    header, reader = read_header(path), gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == theirs
    assert header.size == path.stat().st_size
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert (info.offset, info.type_number) == (tensor.data_offset, tensor.tensor_type.value)
        assert info.shape == tensor.data.shape
    assert list(header.tensors) == ["one", "two"]


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def head(n_tensors: int = 0, n_fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields)


FIELD = string(b"a") + struct.pack("<II", 4, 1)
TENSOR = string(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04", r"expected a GGUF file, got one that begins with b'PK"),
        (b"GGUF", "ends inside its header"),
        (head(version=1), "expected GGUF version 2 or 3, little-endian, got version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "got a big-endian file"),
        (head(n_fields=2**63) + FIELD, "ends inside its header"),
        (head(n_tensors=2**63) + TENSOR, "ends inside its header"),
        (head(n_fields=2) + FIELD * 2, "has the field 'a' twice"),
        (head(n_tensors=2) + TENSOR * 2, "has the tensor 't' twice"),
        (head(n_fields=1) + struct.pack("<Q", 2**60), "ends inside its header"),
        (head(n_fields=1) + string(b"\xff"), "has a text that is not UTF-8"),
        (head(n_fields=1) + string(b"a") + struct.pack("<I", 13), "a value of the unknown type 13"),
        (head(n_fields=1) + string(b"a") + struct.pack("<IIQ", 9, 0, 2**62), "an array of 4611686018427387904 values"),
        (head(n_fields=1) + string(b"a") + struct.pack("<IIQ", 9, 9, 1), "a value of the unknown type 9"),
        (head(n_fields=1) + string(b"general.alignment") + struct.pack("<II", 4, 3), "expected a multiple of 8"),
        (head(n_tensors=1) + string(b"t") + struct.pack("<I", 9), "has 9 dimensions, expected 4 at most"),
        (head(n_tensors=1) + string(b"t") + struct.pack("<IQIQ", 1, 4, 0, 3), "begins at 3, expected a multiple of 32"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.gguf: .*{message}"):
        read_header(path)


def test_models_in_a_folder(tmp_path: Path) -> None:
    names = ["b.gguf", "a-00002-of-00002.gguf", "a-00001-of-00002.gguf", ".hidden.gguf", "c.txt"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.gguf").mkdir()
    assert gguf_models(tmp_path) == [tmp_path / "a-00001-of-00002.gguf", tmp_path / "b.gguf"]
    assert split_files(tmp_path / "a-00002-of-00002.gguf") == [
        tmp_path / "a-00001-of-00002.gguf",
        tmp_path / "a-00002-of-00002.gguf",
    ]
    assert split_files(tmp_path / "b.gguf") == [tmp_path / "b.gguf"]
    for name in ("a-00003-of-00002.gguf", "a-00000-of-00000.gguf"):
        with pytest.raises(ValueError, match="expected a number from 1 to"):
            split_files(tmp_path / name)
    with pytest.raises(ValueError, match=r"d-00001-of-00003\.gguf and 2 more is not beside it"):
        split_files(tmp_path / "d-00001-of-00003.gguf")
    with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
        read_header(tmp_path / "none.gguf")
