"""Hugging Face checkpoints: config.json beside safetensors, one file or several with an index.

The weights are Meta's under other names, but for one thing: transformers rotates the halves of a head against each
other where Meta rotates neighbouring pairs, so the rows of q and k lie permuted in these files. That is undone here, on
whole heads, at the moment a slice is read.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastllama.checkpoint.base import (
    Checkpoint,
    check_dims,
    check_dtypes,
    check_names,
    check_shapes,
    dtype_name,
    file_sizes,
    head_dim_of,
    read_start,
)
from fastllama.checkpoint.fields import MOST_LAYERS, Fields, listing, shown
from fastllama.checkpoint.layout import EMBEDDING_NAME, OUTPUT_NAME, Stored, weights

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
SINGLE_FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FILE_PATTERN = "*.safetensors"

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
# A buffer that older files carry; it follows from the configuration.
IGNORED_SUFFIX = ".rotary_emb.inv_freq"
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# transformers' defaults for fields that config.json may leave out.
NORM_EPS = 1e-6
ROPE_THETA = 10000.0


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
    config = Fields.read(folder / CONFIG_NAME)
    params = _params(config)
    files, found = _find_tensors(folder)

    check_dtypes(folder, {name: _torch_name(piece.stored_dtype) for name, piece in found.items()})
    theirs = their_names(params["n_layers"])
    expected = list(theirs.values())
    if params["tied_output"] and theirs[OUTPUT_NAME] not in found:
        expected.remove(theirs[OUTPUT_NAME])
    check_names(folder, expected, found)
    if params["vocab_size"] == -1:
        params["vocab_size"] = _vocabulary(folder, found[theirs[EMBEDDING_NAME]].shape, params["dim"])

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
    return Checkpoint(
        path=folder,
        format="huggingface",
        params=params,
        files=file_sizes(files),
        dtype=found[theirs[EMBEDDING_NAME]].dtype,
        stop_token_ids=_stop_token_ids(folder, config),
        stored=stored,
    )


def _params(config: Fields) -> dict[str, Any]:
    """config.json as ModelArgs fields; vocab_size is -1 where only the embedding tells."""
    model_type = config.values.get("model_type")
    if model_type != "llama":
        raise ValueError(f"{config.path}: expected a Llama model (model_type 'llama'), got {shown(model_type)}")
    if config.has("quantization_config"):
        method = (config.section("quantization_config") or config).values.get("quant_method", "unknown")
        raise ValueError(
            f"{config.path}: quantization_config marks a quantised checkpoint (quant_method {shown(method)}); "
            "use the original weights"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.flag(key):
            raise config.error(key, "false (Llama 3 has no biases)")
    if config.has("hidden_act") and config.values["hidden_act"] != "silu":
        raise config.error("hidden_act", "'silu'")
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    params: dict[str, Any] = {
        "dim": dim,
        "n_layers": config.integer("num_hidden_layers", most=MOST_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": config.integer("num_key_value_heads", n_heads),
        "vocab_size": config.integer("vocab_size", -1),
        "norm_eps": config.number("rms_norm_eps", NORM_EPS),
        "head_dim": head_dim_of(config, dim, n_heads),
        "hidden_dim": config.integer("intermediate_size"),
        "tied_output": config.flag("tie_word_embeddings"),
        **_rope(config),
    }
    check_dims(config, params)
    return params


def _rope(config: Fields) -> dict[str, Any]:
    """The rotary embedding, from the fields of transformers 5 (rope_parameters) or of 4 (rope_theta, rope_scaling)."""
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    scaling = old or new or Fields(config.path, {})
    theta = config.number("rope_theta", ROPE_THETA)
    for section in (new, old):
        theta = section.number("rope_theta", theta) if section else theta
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.error("partial_rotary_factor", "1 (Llama rotates whole heads)")

    kind_key = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.values.get(kind_key) or "default"
    if kind == "default":
        return {"rope_theta": theta, "use_scaled_rope": False}
    if kind != "llama3":
        raise scaling.error(kind_key, "'llama3' or 'default'")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if not low < high:
        raise scaling.error("high_freq_factor", f"more than low_freq_factor, {low}")
    return {
        "rope_theta": theta,
        "use_scaled_rope": True,
        "rope_scaling_factor": scaling.number("factor"),
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_max_seq_len": scaling.integer("original_max_position_embeddings"),
    }


def _find_tensors(folder: Path) -> tuple[list[Path], dict[str, StoredSlice]]:
    """The weights' files and every tensor in them; one file goes before an index, as in transformers."""
    index = folder / INDEX_NAME
    listed: dict[str, str] | None = None
    if (folder / SINGLE_FILE_NAME).exists():
        files = [folder / SINGLE_FILE_NAME]
    elif index.exists():
        listed = _read_index(index)
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        files = sorted(folder.glob(FILE_PATTERN))
    found: dict[str, StoredSlice] = {}
    place: dict[str, str] = {}
    for path in files:
        handle = _open_file(path)
        for name in handle.keys():  # noqa: SIM118 (the handle is no dict)
            if name in place:
                raise ValueError(f"{path}: {shown(name)} is also in {place[name]}; remove the file that is not wanted")
            place[name] = path.name
            if not name.endswith(IGNORED_SUFFIX):
                found[name] = StoredSlice(handle, name)
    if listed is not None:
        _check_index(index, listed, place)
    empty = [f"{name} {piece.shape}" for name, piece in found.items() if 0 in piece.shape]
    if empty:
        raise ValueError(f"{folder}: expected tensors with data, got none in {listing(empty)}")
    return files, found


def _read_index(path: Path) -> dict[str, str]:
    """Which file holds which tensor; ValueError where the index is broken or a file of it is not in the folder."""
    fields = Fields.read(path)
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


def _check_index(path: Path, listed: dict[str, str], place: dict[str, str]) -> None:
    """ValueError unless the files hold just what the index lists; `place` is the file that holds each tensor."""
    absent = [f"{name} in {file}" for name, file in listed.items() if place.get(name) != file]
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


def _stop_token_ids(folder: Path, config: Fields) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, which is what transformers stops at, else of config.json."""
    path = folder / GENERATION_CONFIG_NAME
    generation = Fields.read(path) if path.exists() else None
    return (generation.token_ids("eos_token_id") if generation else ()) or config.token_ids("eos_token_id")
