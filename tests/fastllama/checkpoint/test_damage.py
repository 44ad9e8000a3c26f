"""Damaged and hostile checkpoint files: an error of the documented type names the file, and nothing is executed."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.bad_checkpoints import WEIGHTS, edit_shard, good, huggingface, meta, next_call_works, refused

__all__ = ["good", "next_call_works"]  # fixtures

# Damaged and hostile files


@pytest.mark.parametrize("kept", [0, 1, 3, 1000, -1, -200, 0.5, 0.99])
@pytest.mark.parametrize("layout", ["pth", "safetensors"])
def test_open_rejects_truncated_files(tmp_path: Path, layout: str, kept: float) -> None:
    (meta if layout == "pth" else huggingface)(tmp_path)
    path = next(tmp_path.glob(f"*.{layout}"))
    size = path.stat().st_size
    os.truncate(path, int(kept * size) if isinstance(kept, float) else kept % size)
    refused(tmp_path, path.name)


@pytest.mark.parametrize("layout", ["pth", "safetensors"])
def test_open_rejects_other_content(tmp_path: Path, layout: str) -> None:
    (meta if layout == "pth" else huggingface)(tmp_path)
    path = next(tmp_path.glob(f"*.{layout}"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16060617592\n")
    refused(tmp_path, path.name, "git lfs pull")
    path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    refused(tmp_path, path.name)
    path.unlink()
    path.symlink_to(tmp_path / "blob that is not there")
    refused(tmp_path, path.name)
    path.unlink()
    path.mkdir()
    refused(tmp_path, path.name)


def test_open_never_executes_a_pickle(tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    meta(tmp_path)
    edit_shard(tmp_path, lambda shard: shard.update(extra=Hostile()))
    refused(tmp_path, "consolidated.00.pth", "nothing in it is executed", "mkdir")
    torch.save({"extra": Hostile()}, tmp_path / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path, "consolidated.00.pth", "not a zip archive")
    assert not trace.exists()


def test_open_rejects_files_of_old_torch(tmp_path: Path) -> None:
    torch.save(WEIGHTS, meta(tmp_path) / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path, "consolidated.00.pth", "save it again")


@pytest.mark.parametrize("damage", ["compressed", "short", "no_pickle"])
def test_open_rejects_repacked_archives(tmp_path: Path, damage: str) -> None:
    path = meta(tmp_path) / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    method = zipfile.ZIP_DEFLATED if damage == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            if damage != "no_pickle" or not name.endswith("data.pkl"):
                archive.writestr(name, data[:10] if damage == "short" else data)
    refused(tmp_path, "consolidated.00.pth", "compress" if damage == "compressed" else "damaged")


@pytest.mark.parametrize(
    ("content", "mention"),
    [
        ([torch.ones(2)], "got a list"),
        (torch.ones(2), "got a Tensor"),
        ({"model": WEIGHTS}, "got 'model' with a dict"),
        ({0: torch.ones(2)}, "got 0 with a Tensor"),
        ({**WEIGHTS, "step": 7}, "got 'step' with a int"),
    ],
)
def test_open_rejects_a_pth_that_is_no_flat_dict(tmp_path: Path, content: Any, mention: str) -> None:
    refused(edit_shard(meta(tmp_path), lambda _: content), "consolidated.00.pth", mention)
