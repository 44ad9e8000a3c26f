"""Reads Hugging Face's config.json and generation_config.json as ModelArgs fields.

If fields contradict each other, the value that transformers uses is used, with a warning in the log.
"""

from pathlib import Path
from typing import Any

from fastllama.checkpoint.base import check_dims, read_head_dim
from fastllama.checkpoint.huggingface_rope import read_rope
from fastllama.checkpoint.json_config import MAX_LAYERS, JsonConfig, short_repr

GENERATION_CONFIG_NAME = "generation_config.json"
NORM_EPS = 1e-6  # transformers' default


def model_params(config: JsonConfig) -> dict[str, Any]:
    """config.json as ModelArgs fields. vocab_size is -1 if only the embedding's shape gives it."""
    model_type = config.values.get("model_type")
    if model_type != "llama":
        raise ValueError(
            f"{config.path}: expected a Llama model (model_type 'llama'), got {short_repr(model_type)}; "
            "fastllama runs Llama's architecture only"
        )
    if config.has("hidden_act") and config.values["hidden_act"] != "silu":
        raise config.error("hidden_act", "'silu'")
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    params: dict[str, Any] = {
        "dim": dim,
        "n_layers": config.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": config.integer("num_key_value_heads", n_heads),
        "vocab_size": config.integer("vocab_size", -1),
        "norm_eps": config.number("rms_norm_eps", NORM_EPS),
        "head_dim": read_head_dim(config, dim, n_heads),
        "hidden_dim": config.integer("intermediate_size"),
        "tied_output": config.flag("tie_word_embeddings"),
        "attention_bias": config.flag("attention_bias"),
        "mlp_bias": config.flag("mlp_bias"),
        **read_rope(config),
    }
    check_dims(config, params)
    return params


def stop_token_ids(folder: Path, config: JsonConfig) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, at which transformers stops, else of config.json."""
    path = folder / GENERATION_CONFIG_NAME
    generation = JsonConfig.read(path) if path.exists() else None
    return (generation.token_ids("eos_token_id") if generation else ()) or config.token_ids("eos_token_id")
