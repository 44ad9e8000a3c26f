"""Reads Hugging Face's config.json and generation_config.json as ModelArgs fields.

If fields contradict each other, the value that transformers uses is used, with a warning in the log.
"""

from pathlib import Path
from typing import Any

from fastllama.checkpoint.base import check_dims, read_head_dim
from fastllama.checkpoint.json_config import MAX_LAYERS, JsonConfig, short_list, short_repr

GENERATION_CONFIG_NAME = "generation_config.json"
# transformers' defaults for fields that config.json may omit.
NORM_EPS = 1e-6
ROPE_THETA = 10000.0
MAX_POSITION_EMBEDDINGS = 2048

LLAMA3_FIELDS = frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})
ROPE_FIELDS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def model_params(config: JsonConfig) -> dict[str, Any]:
    """config.json as ModelArgs fields. vocab_size is -1 if only the embedding's shape gives it."""
    model_type = config.values.get("model_type")
    if model_type != "llama":
        raise ValueError(f"{config.path}: expected a Llama model (model_type 'llama'), got {short_repr(model_type)}")
    if config.has("quantization_config"):
        method = (config.section("quantization_config") or config).values.get("quant_method", "unknown")
        raise ValueError(
            f"{config.path}: quantization_config marks a quantised checkpoint (quant_method {short_repr(method)}); "
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
        "n_layers": config.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": config.integer("num_key_value_heads", n_heads),
        "vocab_size": config.integer("vocab_size", -1),
        "norm_eps": config.number("rms_norm_eps", NORM_EPS),
        "head_dim": read_head_dim(config, dim, n_heads),
        "hidden_dim": config.integer("intermediate_size"),
        "tied_output": config.flag("tie_word_embeddings"),
        **_read_rope(config),
    }
    check_dims(config, params)
    return params


def _read_rope(config: JsonConfig) -> dict[str, Any]:
    """The rotary embedding's fields, from those of transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling).

    If both sections are present, only rope_scaling is read. rope_theta in the section goes before rope_theta outside.
    """
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    if new and old and new.values != old.values:
        config.warn("rope_scaling and rope_parameters differ; rope_scaling is used, as in transformers")
    scaling = old or new or JsonConfig(config.path, {})
    theta = _number_in(scaling, config, "rope_theta", ROPE_THETA)
    if _number_in(scaling, config, "partial_rotary_factor", 1.0) != 1.0:
        holder = scaling if scaling.has("partial_rotary_factor") else config
        raise holder.error("partial_rotary_factor", "1 (Llama rotates whole heads)")
    for key, value in scaling.values.items():
        if isinstance(value, dict | list):
            raise scaling.error(key, "a number or a name (Llama's layers all rotate alike)")

    kind_key = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.values.get(kind_key) or "default"
    if kind not in ("default", "llama3"):
        raise scaling.error(kind_key, "'llama3' or 'default'")
    read = ROPE_FIELDS | (LLAMA3_FIELDS if kind == "llama3" else set())
    if unread := [key for key in scaling.values if key not in read and scaling.has(key)]:
        config.warn(f"{short_list([scaling.full_name(key) for key in unread])} has no effect with rope_type {kind!r}")
    if kind == "default":
        return {"rope_theta": theta, "use_scaled_rope": False}
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if not low < high:
        raise scaling.error("high_freq_factor", f"more than low_freq_factor, {low}")
    return {
        "rope_theta": theta,
        "use_scaled_rope": True,
        "rope_scaling_factor": scaling.number("factor"),
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_max_seq_len": _original_max_seq_len(config, scaling),
    }


def _number_in(section: JsonConfig, config: JsonConfig, key: str, default: float) -> float:
    """The section's number, else the one outside the section, else the default. Warns if both differ."""
    inner, outer = section.number(key, default), config.number(key, default)
    if section.has(key) and config.has(key) and inner != outer:
        config.warn(f"{section.full_name(key)}={inner:g} is used, not {key}={outer:g}, as in transformers")
    return inner if section.has(key) else outer


def _original_max_seq_len(config: JsonConfig, scaling: JsonConfig) -> int:
    """The context length before scaling. Unlike with other fields, the value outside the section goes first."""
    key = "original_max_position_embeddings"
    fallback = config.integer("max_position_embeddings", MAX_POSITION_EMBEDDINGS)
    inner = scaling.integer(key, fallback)
    outer = config.integer(key, inner)
    if scaling.has(key) and inner != outer:
        config.warn(f"{key}={outer} is used, not {scaling.full_name(key)}={inner}, as in transformers")
    return outer


def stop_token_ids(folder: Path, config: JsonConfig) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, at which transformers stops, else of config.json."""
    path = folder / GENERATION_CONFIG_NAME
    generation = JsonConfig.read(path) if path.exists() else None
    return (generation.token_ids("eos_token_id") if generation else ()) or config.token_ids("eos_token_id")
