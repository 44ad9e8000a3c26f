"""Reads the metadata of a GGUF file as ModelArgs fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllama.checkpoint.base import check_dims
from fastllama.checkpoint.gguf_rope import read_rope
from fastllama.checkpoint.json_config import MAX_LAYERS, JsonConfig, short_repr

ARCHITECTURE = "llama"


def gguf_params(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as ModelArgs fields. vocab_size is -1 if only the embedding's shape gives it.

    ValueError for another architecture, for missing or invalid fields, and for features that Llama does not have.
    """
    config = JsonConfig(path, dict(metadata))
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{path}: expected a model of the architecture 'llama', got {short_repr(architecture)}; "
            "fastllama runs Llama's architecture only"
        )
    dim, n_heads = config.integer(_key("embedding_length")), config.integer(_key("attention.head_count"))
    if not config.has(_key("attention.key_length")) and dim % n_heads:
        raise config.error(_key("embedding_length"), f"a multiple of the number of heads, {n_heads}")
    params: dict[str, Any] = {
        "dim": dim,
        "n_layers": config.integer(_key("block_count"), maximum=MAX_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": config.integer(_key("attention.head_count_kv"), n_heads),
        "vocab_size": config.integer(_key("vocab_size"), -1),
        "norm_eps": config.number(_key("attention.layer_norm_rms_epsilon")),
        "head_dim": config.integer(_key("attention.key_length"), dim // n_heads),
        "hidden_dim": config.integer(_key("feed_forward_length")),
        **read_rope(config),
    }
    check_dims(config, params)
    _refuse_other_models(config, params["head_dim"])
    return params


def _key(name: str) -> str:
    return f"{ARCHITECTURE}.{name}"


def _refuse_other_models(config: JsonConfig, head_dim: int) -> None:
    """Raise ValueError for fields that say that the model computes something else than Llama 3."""
    for name in ("attention.value_length", "rope.dimension_count"):
        if config.integer(_key(name), head_dim) != head_dim:
            raise config.error(_key(name), f"the size of a head, {head_dim}")
    if config.values.get(_key("expert_count")):
        raise config.error(_key("expert_count"), "0 (Llama 3 has no experts)")
