"""Checkpoints: from Meta's or Hugging Face's files to (name, slice) pairs for any process of any number.

`open_checkpoint` finds the weights in a folder, checks everything that can be checked without reading them, and returns
a `Checkpoint`. Where a folder holds both layouts, as Hugging Face's Llama repositories do, Meta's files are taken: the
tokenizer.model that belongs to them lies beside them.
"""

import os
from pathlib import Path

from fastllama.checkpoint.base import Checkpoint
from fastllama.checkpoint.huggingface import CONFIG_NAME, FILE_PATTERN, open_huggingface
from fastllama.checkpoint.meta import PARAMS_NAME, SHARD_PATTERN, open_meta, shard_files

__all__ = ["Checkpoint", "open_checkpoint"]

# Where Meta's files lie in its own downloads and in Hugging Face's repositories (mp8 and mp16: 405B).
META_PLACES = (".", "original", "original/mp8", "original/mp16")
FILES_SHOWN = 12


def open_checkpoint(ckpt_dir: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a folder; only headers are read.

    Looked for in this order: params.json with `*.pth` in the folder itself, in `original/`, `original/mp8` and
    `original/mp16`; then config.json with `*.safetensors` in the folder itself.

    AssertionError when the folder does not exist or holds none of these; ValueError when what it holds is incomplete,
    damaged, quantised, or not the Llama that its configuration describes.
    """
    folder = Path(ckpt_dir)
    if not os.path.isdir(folder):  # unlike Path.is_dir, false for any string
        what = "is a file; pass the folder it is in" if os.path.exists(folder) else "does not exist"
        raise AssertionError(f"checkpoint folder {str(folder)!r} {what}")
    with_shards = [place for place in (folder / name for name in META_PLACES) if shard_files(place)]
    for place in with_shards:
        if (place / PARAMS_NAME).exists():
            return open_meta(place)
    if any(folder.glob(FILE_PATTERN)):
        return open_huggingface(folder)
    if with_shards:
        return open_meta(with_shards[0])  # says that params.json is missing
    raise AssertionError(_nothing_found(folder))


def _nothing_found(folder: Path) -> str:
    present = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    shown = ", ".join(present[:FILES_SHOWN]) + (" …" if len(present) > FILES_SHOWN else "")
    message = (
        f"no checkpoint in {str(folder)!r}: expected {PARAMS_NAME} and {SHARD_PATTERN} there or in original/, "
        f"or {CONFIG_NAME} and {FILE_PATTERN}; it holds {shown or 'nothing'}"
    )
    if any(name.startswith("pytorch_model") for name in present):
        message += "; convert pytorch_model*.bin to safetensors first: transformers' save_pretrained writes them"
    return message
