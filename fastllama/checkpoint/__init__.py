"""Checkpoints: from Meta's or Hugging Face's files to (name, slice) pairs for any process of any number.

`open_checkpoint` finds the weights in a folder, checks everything that can be checked without reading them, and returns
a `Checkpoint`. A folder's own weights go before those under `original/`, which in Hugging Face's repositories are the
base model's: a fine-tuned model lies beside them. Where a folder itself holds both layouts, Meta's is taken, as the
function that this replaces takes it. What was taken and what was passed over is logged.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path

from fastllama.checkpoint.base import Checkpoint
from fastllama.checkpoint.huggingface import CONFIG_NAME, open_huggingface
from fastllama.checkpoint.json_config import listing
from fastllama.checkpoint.meta import PARAMS_NAME, open_meta
from fastllama.checkpoint.other_formats import (
    OWN_WEIGHTS,
    PICKLED_ADAPTERS,
    describe_file,
    describe_folder,
    find_below,
    stray_files,
)
from fastllama.checkpoint.weight_files import AN_ADAPTER, FILE_PATTERN, SHARD_PATTERN, huggingface_files, meta_files

__all__ = ["Checkpoint", "open_checkpoint"]

logger = logging.getLogger(__name__)

# Where Meta's files lie in Hugging Face's repositories (mp8 and mp16: 405B).
PLACES_BELOW = ("original", "original/mp8", "original/mp16")
FILES_SHOWN = 12


def open_checkpoint(ckpt_dir: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a folder; only headers are read, and the few weights that several files must agree on.

    Looked for in this order: params.json with `*.pth` in the folder itself; config.json with `*.safetensors` there;
    params.json with `*.pth` in `original/`, `original/mp8` and `original/mp16`.

    AssertionError when the folder does not exist or holds none of these; ValueError when what it holds is incomplete,
    damaged, quantised, contradicts itself, or is not the Llama that its configuration describes.
    """
    folder = Path(ckpt_dir)
    if not os.path.isdir(folder):  # unlike Path.is_dir, false for any string
        what = describe_file(folder) if os.path.exists(folder) else "does not exist"
        raise AssertionError(f"checkpoint folder {str(folder)!r} {what}")
    checkpoint = _open(folder)
    passed_over = (*checkpoint.passed_over, *_others(folder, checkpoint))
    names = [f"{listing([str(path.relative_to(folder))])} ({why})" for path, why in passed_over]
    if adapters := [path.name for path, why in passed_over if why == AN_ADAPTER]:
        logger.warning("%s: %s is an adapter and is not applied: merge it first", folder, listing(adapters))
    logger.info(
        "checkpoint: %s, %s%s",
        checkpoint.path,
        ", ".join(path.name for path, _ in checkpoint.files),
        f"; passed over: {', '.join(names)}" if names else "",
    )
    return replace(checkpoint, passed_over=passed_over)


def _open(folder: Path) -> Checkpoint:
    own_shards, own_safetensors = meta_files(folder).taken, huggingface_files(folder).taken
    has_params = (folder / PARAMS_NAME).exists()
    if own_shards and has_params:
        return open_meta(folder)
    if own_safetensors:
        if has_params and not (folder / CONFIG_NAME).exists():
            raise ValueError(
                f"{folder}: holds {PARAMS_NAME} and safetensors, but {PARAMS_NAME} describes {SHARD_PATTERN}; "
                'torch.save(safetensors.torch.load_file(path), "consolidated.00.pth") makes one'
            )
        return open_huggingface(folder)  # says where config.json is missing
    if own_shards:
        return open_meta(folder)  # says that params.json is missing
    below = [place for place in (folder / name for name in PLACES_BELOW) if meta_files(place).taken]
    complete = [place for place in below if (place / PARAMS_NAME).exists()]
    other = describe_folder(folder, OWN_WEIGHTS) if below else describe_folder(folder)
    if not below or other:
        raise AssertionError(_nothing_found(folder, other, complete))
    return open_meta((complete or below)[0])


def _others(folder: Path, checkpoint: Checkpoint) -> list[tuple[Path, str]]:
    """Weights that were not taken and lie outside the folder of those that were, or in another layout."""
    own = checkpoint.path == folder
    found = []
    for layout, files in (("meta", meta_files(folder)), ("huggingface", huggingface_files(folder))):
        if not (own and checkpoint.format == layout):
            why = f"no {PARAMS_NAME} beside it" if layout == "meta" else "Meta's layout goes first"
            found += [(path, why) for path in files.taken] + files.passed_over
    found += [(folder / name, AN_ADAPTER) for name in PICKLED_ADAPTERS if (folder / name).exists()]
    found += [(path, "in another format") for path in stray_files(folder) if not own]
    for place in (folder / name for name in PLACES_BELOW):
        if place != checkpoint.path and meta_files(place).taken:
            first = checkpoint.path.relative_to(folder)
            found.append((place, "the folder's own weights go first" if own else f"{first} goes first"))
    return found


def _nothing_found(folder: Path, other: str | None, below: list[Path]) -> str:
    start = f"no checkpoint in {str(folder)!r}: "
    if other:
        place = below[0].relative_to(folder) if below else ""
        return start + other + (f". {place}/ holds other weights: pass that folder to run those" if below else "")
    present = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    shown = ", ".join(present[:FILES_SHOWN]) + (" …" if len(present) > FILES_SHOWN else "")
    message = (
        f"{start}expected {PARAMS_NAME} and {SHARD_PATTERN} there or in original/, "
        f"or {CONFIG_NAME} and {FILE_PATTERN}; it holds {shown or 'nothing'}"
    )
    if found := find_below(folder, _holds_checkpoint):
        return f"{message}; pass the folder below it that holds one: {listing(list(map(str, found)))}"
    return message


def _holds_checkpoint(folder: Path) -> bool:
    shards = any((place / PARAMS_NAME).exists() and meta_files(place).taken for place in (folder, folder / "original"))
    return shards or ((folder / CONFIG_NAME).exists() and bool(huggingface_files(folder).taken))
