"""Reads PEFT's adapter_model.safetensors: the two factors of every module that the adapter changes."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastllama.checkpoint.base import check_dtypes
from fastllama.checkpoint.json_config import short_list, short_repr
from fastllama.checkpoint.safetensors_files import SafetensorsTensor, open_safetensors
from fastllama.checkpoint.unsupported_formats import ADAPTER_CONFIG_NAME, MERGE_WITH_PEFT, PICKLED_ADAPTERS

ADAPTER_FILE_NAME = "adapter_model.safetensors"
MLX_FILE_NAME = "adapters.safetensors"
# Prefixes that PEFT and transformers put before a module; with a base model alone (LlamaModel) there are fewer.
OUTER_PREFIXES = r"(?:base_model\.)?(?:model\.)*"
# Names in a saved file end with lora_A.weight, those of a model in memory with lora_A.NAME_OF_THE_ADAPTER.weight. The
# factors of an embedding are parameters, not modules, and have no ".weight".
FACTOR_NAME = re.compile(
    OUTER_PREFIXES + r"(?P<module>.+?)\.lora_(?P<kind>embedding_)?(?P<side>[AB])"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.weight)?"
)
COPY_NAME = re.compile(OUTER_PREFIXES + r"(?P<module>embed_tokens|lm_head)(?:\.base_layer)?\.weight")
EMBEDDING_MODULE = "embed_tokens"
# Parts of names of tensors that no merge of A and B can apply, each with what it means.
REFUSED_PARTS = {
    "lora_magnitude_vector": "DoRA scales the merged rows",
    "modules_to_save": "a module that is stored complete, not as LoRA",
    ".bias": "a trained bias",
}


@dataclass
class AdapterTensors:
    """The tensors of one adapter, by the module's name without prefixes ("layers.0.self_attn.q_proj", "lm_head").

    factors: {"A": tensor, "B": tensor}. copies: complete embeddings and outputs, which PEFT stores with their factors.
    """

    path: Path
    factors: dict[str, dict[str, SafetensorsTensor]] = field(default_factory=dict)
    copies: dict[str, SafetensorsTensor] = field(default_factory=dict)


def check_folder(folder: Path) -> None:
    """Raise ValueError unless the folder holds adapter_config.json and adapter_model.safetensors."""
    if not os.path.isdir(folder):
        what = "is not a folder: pass the folder it is in" if os.path.exists(folder) else "does not exist"
        raise ValueError(f"adapter folder {str(folder)!r} {what}")
    if not os.path.exists(folder / ADAPTER_FILE_NAME):
        for name in PICKLED_ADAPTERS:
            if os.path.exists(folder / name):
                raise ValueError(
                    f"{folder / name}: is pickled; convert it: safetensors.torch.save_file("
                    f'torch.load("{name}", weights_only=True), "{ADAPTER_FILE_NAME}")'
                )
    if missing := [name for name in (ADAPTER_CONFIG_NAME, ADAPTER_FILE_NAME) if not os.path.exists(folder / name)]:
        advice = "; fuse an adapter of MLX into its base with mlx_lm.fuse" if (folder / MLX_FILE_NAME).exists() else ""
        raise ValueError(
            f"{folder}: expected a LoRA adapter as PEFT saves it; it lacks {' and '.join(missing)}{advice}"
        )


def read_tensors(folder: Path, modules: Iterable[str]) -> AdapterTensors:
    """The tensors of the adapter in a folder, headers only. `modules` are those of the base.

    ValueError if the file is damaged, or holds a tensor that is not a factor of one of these modules.
    """
    path = folder / ADAPTER_FILE_NAME
    handle = open_safetensors(path)
    tensors = {name: SafetensorsTensor(handle, name) for name in handle.keys()}  # noqa: SIM118 (the handle is no dict)
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; download it again")
    _refuse_parts(path, tensors)
    known, found = frozenset(modules), AdapterTensors(path)
    names: dict[tuple[str, str], str] = {}
    strangers = []
    for name, tensor in tensors.items():
        factor, copy = FACTOR_NAME.fullmatch(name), COPY_NAME.fullmatch(name)
        match = factor or copy
        if not match or match["module"] not in known or (factor and not _fits_module(factor)):
            strangers.append(name)
            continue
        side = factor["side"] if factor else "copy"
        first = names.setdefault((match["module"], side), name)
        if first != name:
            raise ValueError(f"{path}: {short_repr(first)} and {short_repr(name)} are names of the same tensor")
        if factor:
            found.factors.setdefault(match["module"], {})[side] = tensor
        else:
            found.copies[match["module"]] = tensor
    if strangers:
        raise ValueError(
            f"{path}: {len(strangers)} tensors are not LoRA factors of a module of the base: {short_list(strangers)}; "
            "pass the base that the adapter was trained on"
        )
    check_dtypes(path, {name: tensor.dtype_text for name, tensor in tensors.items()})
    _check_pairs(path, found.factors)
    return found


def _fits_module(factor: re.Match[str]) -> bool:
    return (factor["module"] == EMBEDDING_MODULE) == bool(factor["kind"])


def _refuse_parts(path: Path, tensors: Iterable[str]) -> None:
    for part, what in REFUSED_PARTS.items():
        if names := [name for name in tensors if part in name]:
            raise ValueError(f"{path}: {short_list(names)}: {what}; {MERGE_WITH_PEFT}")


def _check_pairs(path: Path, factors: Mapping[str, Mapping[str, SafetensorsTensor]]) -> None:
    alone = [f"{module} has only {next(iter(sides))}" for module, sides in factors.items() if len(sides) == 1]
    if alone:
        raise ValueError(f"{path}: expected A and B of every module: {short_list(alone)}; download it again")
