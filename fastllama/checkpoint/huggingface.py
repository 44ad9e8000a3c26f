"""Hugging Face checkpoints: config.json beside safetensors, one file or several, mostly with an index.

The weights are Meta's under other names, but for one thing: transformers rotates the halves of a head against each
other where Meta rotates neighbouring pairs, so the rows of q and k lie permuted in these files. That is undone here, on
whole heads, at the moment a slice is read.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastllama.checkpoint.base import (
    Checkpoint,
    check_dtypes,
    check_names,
    check_shapes,
    count_layers,
    dtype_name,
    file_sizes,
    read_start,
)
from fastllama.checkpoint.consistency import same_values, warn_of_frequencies
from fastllama.checkpoint.huggingface_config import model_params, stop_token_ids
from fastllama.checkpoint.json_config import JsonConfig, listing, shown
from fastllama.checkpoint.sharding import EMBEDDING_NAME, OUTPUT_NAME, Stored, weights
from fastllama.checkpoint.weight_files import WeightFiles, huggingface_files, whole_set

CONFIG_NAME = "config.json"
SINGLE_FILE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
INDEX_NAME = "model.safetensors.index.json"

OUTER_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
PERMUTED_PARTS = ("attention.wq", "attention.wk")
# Buffers that some files carry: tables of the rotary embedding and causal masks. They follow from the configuration.
DERIVED = re.compile(r"(.*\.)?(rotary_emb\.[^.]+|masked_bias|causal_mask|position_ids)")
FREQUENCIES = "rotary_emb.inv_freq"
CAUSAL_MASK = re.compile(r".*(self_attn|attention|attn)\.bias")
MASK_DIMS = 4
BASE_PREFIX = "model."
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class StoredSlice:
    """A tensor in a safetensors file, of which only the header is read until it is narrowed.

    `head_dim` says that the rows are q's or k's, in transformers' order; Meta's order is what `narrow` returns.
    """

    def __init__(self, handle: Any, name: str) -> None:
        self._slice = handle.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
        self.stored_dtype: str = self._slice.get_dtype()
        self.head_dim: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return SAFETENSORS_DTYPES[self.stored_dtype]

    def whole(self) -> torch.Tensor:
        """All of it, in the stored dtype and order."""
        tensor: torch.Tensor = self._slice[:]
        return tensor

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """`length` of axis `dim` from `start`; along permuted rows these must be whole heads."""
        wanted = slice(start, start + length)
        part: torch.Tensor = self._slice[wanted] if dim == 0 else self._slice[:, wanted]
        return part if self.head_dim is None else to_meta_rows(part, self.head_dim)


def to_meta_rows(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k (heads·D, E) from transformers' order, half after half, to Meta's, pair after pair."""
    n_heads = rows.shape[0] // head_dim
    return rows.view(n_heads, 2, head_dim // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def open_huggingface(folder: Path) -> Checkpoint:
    """The checkpoint in a folder with config.json and safetensors; ValueError where anything is not as it must be."""
    config = JsonConfig.read(folder / CONFIG_NAME)
    params = model_params(config)
    theirs = their_names(params["n_layers"])
    files, found = _find_tensors(folder, config, set(theirs.values()), params["tied_output"])
    frequencies = found.pop(FREQUENCIES, None)

    check_dtypes(folder, {name: _torch_name(piece.stored_dtype) for name, piece in found.items()})
    embedding, output = theirs[EMBEDDING_NAME], theirs[OUTPUT_NAME]
    if params["tied_output"] and output in found:  # either of the two may stand for both
        found.setdefault(embedding, found[output])
    optional = {output} if params["tied_output"] and embedding in found else set()
    expected = [name for name in theirs.values() if name in found or name not in optional]
    check_names(folder, expected, found, _hint(config, expected, found))
    if params["vocab_size"] == -1:
        params["vocab_size"] = _vocabulary(folder, found[embedding].shape, params["dim"])

    stored, shapes = {}, {}
    for weight in weights(params):
        name = theirs[weight.name]
        if name not in found:
            continue
        piece = found[name]
        shapes[name] = (weight.shape, piece.shape)
        if any(f".{part}." in weight.name for part in PERMUTED_PARTS):
            piece.head_dim = params["head_dim"]
        stored[weight.name] = Stored((piece,))
    check_shapes(folder, f"{CONFIG_NAME} asks for", shapes)
    if frequencies is not None:
        warn_of_frequencies(folder, FREQUENCIES, frequencies.whole(), params)
    if params["tied_output"] and OUTPUT_NAME in stored:
        params["tied_output"] = _is_tied(config, stored[EMBEDDING_NAME], stored[OUTPUT_NAME])
    return Checkpoint(
        path=folder,
        format="huggingface",
        params=params,
        files=file_sizes(files.taken),
        dtype=stored[EMBEDDING_NAME].dtype,
        stop_token_ids=stop_token_ids(folder, config),
        stored=stored,
        passed_over=tuple(files.passed_over),
    )


def _is_tied(config: JsonConfig, embedding: Stored, output: Stored) -> bool:
    """Whether an output that is stored although it is said to be the embedding is that."""
    if embedding.pieces[0] is output.pieces[0] or same_values(embedding, output):
        return True
    config.warn(
        "tie_word_embeddings is true, but lm_head.weight is stored and is not model.embed_tokens.weight; "
        "the stored one is used, as in transformers"
    )
    return False


def _hint(config: JsonConfig, expected: Collection[str], found: Mapping[str, StoredSlice]) -> str:
    """What a difference between the names that config.json asks for and those that are there may come from."""
    missing, unexpected = set(expected) - found.keys(), found.keys() - set(expected)
    stated, layers = config.integer("num_hidden_layers"), count_layers(found)
    if layers not in (0, stated):
        return f"{CONFIG_NAME} says num_hidden_layers={stated}, the files have {layers} layers"
    if any(name.endswith("_proj.bias") for name in unexpected):
        return f"{CONFIG_NAME} says nothing of biases (attention_bias, mlp_bias), and Llama 3 has none"
    if missing == {f"{OUTER_NAMES['output']}.weight"}:
        return (
            f"{CONFIG_NAME} does not say tie_word_embeddings true, so there must be an output: "
            "a base model alone (LlamaModel) has none"
        )
    if any(name.endswith(".attention.wq.weight") for name in unexpected):
        return "these are Meta's names; save them with torch.save as consolidated.00.pth beside params.json"
    first = OUTER_NAMES["norm"] + ".weight"
    prefixes = [name.removesuffix(first) for name in unexpected if name.endswith("." + first)]
    return f"names begin with {prefixes[0]!r}, which another program has put there: remove it" if prefixes else ""


def _find_tensors(
    folder: Path, config: JsonConfig, expected: Collection[str], tied: bool
) -> tuple[WeightFiles, dict[str, StoredSlice]]:
    """The weights' files, and every tensor in them by the name that transformers gives it, and one inv_freq."""
    files, index, listed = _choose_files(folder, config)
    found: dict[str, StoredSlice] = {}
    stored_as: dict[str, str] = {}
    place: dict[str, str] = {}
    for path in files.taken:
        handle = _open_file(path)
        for name in handle.keys():  # noqa: SIM118 (the handle is no dict)
            piece = StoredSlice(handle, name)
            if _is_derived(name, piece.shape):
                if name.endswith(FREQUENCIES) and 0 not in piece.shape:
                    found.setdefault(FREQUENCIES, piece)
                continue
            if name in place:
                raise ValueError(f"{path}: {shown(name)} is also in {place[name]}; remove the file that is not wanted")
            place[name] = path.name
            known = _with_prefix(name, expected)
            if known in found:
                raise ValueError(f"{path}: {shown(name)} and {shown(stored_as[known])} are the same tensor's names")
            found[known], stored_as[known] = piece, name
    if listed is not None:
        _check_index(index, listed, place, tied)
    empty = [f"{name} {piece.shape}" for name, piece in found.items() if 0 in piece.shape]
    if empty:
        raise ValueError(f"{folder}: expected tensors with data, got none in {listing(empty)}")
    return files, found


def _choose_files(folder: Path, config: JsonConfig) -> tuple[WeightFiles, Path, dict[str, str] | None]:
    """The files to read, and the index that lists them with its content, None where there is none.

    As in transformers, what config.json names goes first, then model.safetensors, then the index.
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
            files.keep([path], f"{name} goes first")
            return files, path, None
        listed = _read_index(path)
        files.keep([folder / file for file in sorted(set(listed.values()))], f"not in {name}")
        return files, path, listed
    whole_set(folder, files)
    return files, folder, None


def _is_derived(name: str, shape: tuple[int, ...] | None = None) -> bool:
    """Whether a tensor is a buffer that is not read; without its shape, as of one that is not there, by its name."""
    is_mask = CAUSAL_MASK.fullmatch(name) and (shape is None or len(shape) == MASK_DIMS)
    return bool(DERIVED.fullmatch(name) or is_mask)


def _with_prefix(name: str, expected: Collection[str]) -> str:
    """The name in the whole model: files of the base model alone lack the prefix that its part has there."""
    for known in (name, BASE_PREFIX + name, name.removeprefix(BASE_PREFIX)):
        if known in expected:
            return known
    return name


def _read_index(path: Path) -> dict[str, str]:
    """Which file holds which tensor; ValueError where the index is broken or a file of it is not in the folder."""
    fields = JsonConfig.read(path)
    weight_map = fields.section("weight_map")
    if weight_map is None:
        raise fields.error("weight_map", "an object from tensor to file")
    listed = weight_map.values
    # Only plain names: an index must not reach outside its folder.
    strange = [key for key, file in listed.items() if not isinstance(file, str) or Path(file).name != file or not file]
    if strange:
        raise weight_map.error(strange[0], "the name of a file in the same folder")
    missing = sorted(file for file in set(listed.values()) if not os.path.exists(path.parent / file))
    if missing:
        raise ValueError(f"{path}: files are missing from the folder: {listing(missing)}; download them")
    return listed


def _check_index(path: Path, listed: dict[str, str], place: dict[str, str], tied: bool) -> None:
    """ValueError unless the files hold just what the index lists; `place` is the file that holds each weight.

    Buffers that are not read, and an output that is tied, need not be there, as in transformers.
    """
    optional = {name for name in listed if _is_derived(name)}
    if tied:
        optional |= {f"{OUTER_NAMES['output']}.weight"} - place.keys()
    absent = [f"{name} in {file}" for name, file in listed.items() if place.get(name) != file and name not in optional]
    extra = [f"{name} in {file}" for name, file in place.items() if name not in listed]
    if absent:
        raise ValueError(f"{path}: lists {len(absent)} tensors that are not there: {listing(absent)}")
    if extra:
        raise ValueError(f"{path}: does not list {len(extra)} tensors that are there: {listing(extra)}")


def _open_file(path: Path) -> Any:
    read_start(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # its own exception type, and OSError, for a damaged file
        raise ValueError(f"{path}: is truncated or damaged ({shown(str(error))}); download it again") from error


def their_names(n_layers: int) -> dict[str, str]:
    """transformers' name of every weight, by Meta's."""
    theirs = {f"{ours}.weight": f"{name}.weight" for ours, name in OUTER_NAMES.items()}
    for layer in range(n_layers):
        for ours, name in LAYER_NAMES.items():
            theirs[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{name}.weight"
    return theirs


def _torch_name(stored_dtype: str) -> str:
    known = SAFETENSORS_DTYPES.get(stored_dtype)
    return dtype_name(known) if known else stored_dtype


def _vocabulary(folder: Path, shape: tuple[int, ...], dim: int) -> int:
    if len(shape) != 2 or shape[1] != dim:
        raise ValueError(f"{folder}: {OUTER_NAMES['tok_embeddings']}.weight: expected (V, {dim}), got {shape}")
    return shape[0]
