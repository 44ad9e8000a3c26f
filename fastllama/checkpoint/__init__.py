"""Opens checkpoints in Meta's or Hugging Face's layout, and GGUF files; yields (name, slice) pairs for any rank.

`open_checkpoint` finds the weights in a folder, makes every check that needs no weights, and returns a `Checkpoint`.
A folder's own weights are preferred to those under `original/`: Hugging Face's repositories keep the base model there,
even beside a fine-tuned model. If a folder holds several layouts, Meta's is used, as in Meta's `Llama.build`, then
Hugging Face's, then GGUF. The log says what is used and what is passed over.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastllama.checkpoint.adapter import merge_adapters
from fastllama.checkpoint.adapter_files import ADAPTER_FILE_NAME
from fastllama.checkpoint.base import Checkpoint
from fastllama.checkpoint.gguf_file import open_gguf
from fastllama.checkpoint.huggingface import CONFIG_NAME, open_huggingface
from fastllama.checkpoint.json_config import short_list
from fastllama.checkpoint.meta import PARAMS_NAME, open_meta
from fastllama.checkpoint.unsupported_formats import (
    OWN_MODEL_PATTERNS,
    PICKLED_ADAPTERS,
    describe_file,
    describe_folder,
    find_checkpoint_folders,
    holds_adapter,
    stray_files,
)
from fastllama.checkpoint.weight_files import ADAPTER_REASON, FILE_PATTERN, SHARD_PATTERN, huggingface_files, meta_files
from fastllama.gguf_header import GGUF_SUFFIX, gguf_models, is_gguf_file

__all__ = ["Checkpoint", "open_checkpoint"]

logger = logging.getLogger(__name__)

# Where Hugging Face's repositories keep Meta's files (mp8 and mp16: 405B).
META_SUBFOLDERS = ("original", "original/mp8", "original/mp16")
MAX_FILES_LISTED = 12
MAX_FILES_SEARCHED = 200


def open_checkpoint(ckpt_dir: str | os.PathLike[str], adapters: Sequence[str | os.PathLike[str]] = ()) -> Checkpoint:
    """The checkpoint in a folder, or in a GGUF file. Reads headers, and the weights that several files must agree on.

    adapters: folders of LoRA adapters, which are merged in this order when weights are read.

    The order of the search: params.json with `*.pth` in the folder itself; config.json with `*.safetensors` there;
    params.json with `*.pth` in `original/`, `original/mp8` and `original/mp16`; the only GGUF model in the folder.

    Raises AssertionError if the folder does not exist or holds none of these, ValueError if the checkpoint is
    incomplete, damaged, quantised, contradicts itself, or is not the Llama that its configuration describes, or if an
    adapter is damaged, belongs to another base, or cannot be merged.
    """
    folder = Path(ckpt_dir)
    if is_gguf_file(folder):
        checkpoint = open_gguf(folder)
        logger.info("checkpoint: %s, %s", folder.parent, ", ".join(path.name for path, _ in checkpoint.files))
        return _with_adapters(checkpoint, adapters)
    if not os.path.isdir(folder):  # unlike Path.is_dir, never raises for odd strings
        what = describe_file(folder) if os.path.exists(folder) else "does not exist"
        raise AssertionError(f"checkpoint folder {str(folder)!r} {what}")
    checkpoint = _open_first(folder)
    applied = [os.path.realpath(Path(adapter) / ADAPTER_FILE_NAME) for adapter in adapters]
    passed_over = tuple(
        (path, why)
        for path, why in (*checkpoint.passed_over, *_unused_weights(folder, checkpoint))
        if os.path.realpath(path) not in applied
    )
    names = [f"{short_list([str(path.relative_to(folder))])} ({why})" for path, why in passed_over]
    if unused := [path.name for path, why in passed_over if why == ADAPTER_REASON]:
        logger.warning(
            "%s: %s is an adapter and is not applied: pass its folder as adapter= (--adapter) to apply it",
            folder,
            short_list(unused),
        )
    logger.info(
        "checkpoint: %s, %s%s",
        checkpoint.path,
        ", ".join(path.name for path, _ in checkpoint.files),
        (f"; adapters: {', '.join(map(str, adapters))}" if adapters else "")
        + (f"; passed over: {', '.join(names)}" if names else ""),
    )
    return _with_adapters(replace(checkpoint, passed_over=passed_over), adapters)


def _with_adapters(checkpoint: Checkpoint, adapters: Sequence[str | os.PathLike[str]]) -> Checkpoint:
    return merge_adapters(checkpoint, [Path(adapter) for adapter in adapters]) if adapters else checkpoint


def _open_first(folder: Path) -> Checkpoint:
    """The first checkpoint in the order of `open_checkpoint`."""
    own_shards, own_safetensors = meta_files(folder).chosen, huggingface_files(folder).chosen
    has_params = (folder / PARAMS_NAME).exists()
    if own_shards and has_params:
        return open_meta(folder)
    if own_safetensors:
        if has_params and not (folder / CONFIG_NAME).exists():
            raise ValueError(
                f"{folder}: holds {PARAMS_NAME} and safetensors, but {PARAMS_NAME} describes {SHARD_PATTERN}; "
                'torch.save(safetensors.torch.load_file(path), "consolidated.00.pth") makes one'
            )
        return open_huggingface(folder)  # raises if config.json is missing
    if own_shards:
        return open_meta(folder)  # raises, because params.json is missing
    below = [place for place in (folder / name for name in META_SUBFOLDERS) if meta_files(place).chosen]
    complete = [place for place in below if (place / PARAMS_NAME).exists()]
    models = [] if below or holds_adapter(folder) else gguf_models(folder)
    if len(models) > 1:
        names = short_list([path.name for path in models])
        raise ValueError(f"{folder}: holds several GGUF models, {names}; pass the path of the one to use")
    if models:
        return open_gguf(models[0])
    other = describe_folder(folder, OWN_MODEL_PATTERNS) if below else describe_folder(folder)
    if not below or other:
        raise AssertionError(_not_found_message(folder, other, complete))
    return open_meta((complete or below)[0])


def _unused_weights(folder: Path, checkpoint: Checkpoint) -> list[tuple[Path, str]]:
    """Weights that are not used and are in another folder or layout than `checkpoint`, each with the reason."""
    own = checkpoint.path == folder
    unused = []
    for layout, files in (("meta", meta_files(folder)), ("huggingface", huggingface_files(folder))):
        if not (own and checkpoint.format == layout):
            why = f"no {PARAMS_NAME} beside it" if layout == "meta" else "Meta's layout goes first"
            unused += [(path, why) for path in files.chosen] + files.passed_over
    unused += [(folder / name, ADAPTER_REASON) for name in PICKLED_ADAPTERS if (folder / name).exists()]
    unused += [(path, "in another format") for path in stray_files(folder) if not own]
    for place in (folder / name for name in META_SUBFOLDERS):
        if place != checkpoint.path and meta_files(place).chosen:
            first = checkpoint.path.relative_to(folder)
            unused.append((place, "the folder's own weights go first" if own else f"{first} goes first"))
    return unused


def _not_found_message(folder: Path, other: str | None, below: list[Path]) -> str:
    start = f"no checkpoint in {str(folder)!r}: "
    if other:
        place = below[0].relative_to(folder) if below else ""
        return start + other + (f". {place}/ holds other weights: pass that folder to use them" if below else "")
    present = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    shown = ", ".join(present[:MAX_FILES_LISTED]) + (" …" if len(present) > MAX_FILES_LISTED else "")
    message = (
        f"{start}expected {PARAMS_NAME} and {SHARD_PATTERN} there or in original/, "
        f"or {CONFIG_NAME} and {FILE_PATTERN}, or one *{GGUF_SUFFIX}; it holds {shown or 'nothing'}"
    )
    entries = sorted(folder.iterdir())[:MAX_FILES_SEARCHED]
    if files := [str(path) for path in entries if is_gguf_file(path)]:  # without the suffix, as in Ollama's store
        return f"{message}; pass the path of the GGUF file: {short_list(files)}"
    if subfolders := find_checkpoint_folders(folder, _holds_checkpoint):
        return f"{message}; pass the folder below it that holds one: {short_list(list(map(str, subfolders)))}"
    return message


def _holds_checkpoint(folder: Path) -> bool:
    shards = any((place / PARAMS_NAME).exists() and meta_files(place).chosen for place in (folder, folder / "original"))
    safetensors = (folder / CONFIG_NAME).exists() and bool(huggingface_files(folder).chosen)
    return shards or safetensors or bool(gguf_models(folder))
