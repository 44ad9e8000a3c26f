"""Reads the rotary embedding's fields of Hugging Face's config.json as ModelArgs fields.

They are in the section rope_parameters (transformers 5), or in rope_scaling and beside it (transformers 4).
"""

from typing import Any

from fastllama.args import yarn_attention_factor
from fastllama.checkpoint.json_config import JsonConfig, short_list

# transformers' defaults for fields that config.json may omit.
ROPE_THETA = 10000.0
MAX_POSITION_EMBEDDINGS = 2048
BETA_FAST, BETA_SLOW = 32.0, 1.0

COMMON_FIELDS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
ORIGINAL_LENGTH = "original_max_position_embeddings"
# The fields that each type reads.
TYPE_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH}),
    "yarn": frozenset({"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"})
    | {ORIGINAL_LENGTH},
}


def read_rope(config: JsonConfig) -> dict[str, Any]:
    """The rotary embedding's fields. ValueError for a type that is not supported, or fields that it cannot have.

    If both sections are present, only rope_scaling is read. rope_theta in the section goes before rope_theta outside.
    """
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    if new and old and new.values != old.values:
        config.warn("rope_scaling and rope_parameters differ; rope_scaling is used, as in transformers")
    scaling = old or new or JsonConfig(config.path, {})
    kind = _read_type(scaling)
    theta = _number_in(scaling, config, "rope_theta", ROPE_THETA)
    if _number_in(scaling, config, "partial_rotary_factor", 1.0) != 1.0:
        holder = scaling if scaling.has("partial_rotary_factor") else config
        raise holder.error("partial_rotary_factor", "1 (Llama rotates whole heads)")
    for key, value in scaling.values.items():
        if isinstance(value, dict | list):
            raise scaling.error(key, "a number or a name (Llama's layers all rotate alike)")
    read = COMMON_FIELDS | TYPE_FIELDS[kind]
    if unread := [key for key in scaling.values if key not in read and scaling.has(key)]:
        config.warn(f"{short_list([scaling.full_name(key) for key in unread])} has no effect with rope_type {kind!r}")

    fields: dict[str, Any] = {"rope_theta": theta, "use_scaled_rope": kind == "llama3"}
    if kind == "linear":
        fields |= {"rope_type": kind, "rope_scaling_factor": scaling.number("factor")}
    elif kind == "llama3":
        fields |= _read_llama3(config, scaling)
    elif kind == "yarn":
        if theta <= 1:
            raise ValueError(f"{config.path}: expected rope_theta above 1 with rope_type 'yarn', got {theta:g}")
        fields |= {"rope_type": kind, **_read_yarn(config, scaling)}
    return fields


def _read_type(scaling: JsonConfig) -> str:
    key = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.values.get(key) or "default"
    if not isinstance(kind, str) or kind not in TYPE_FIELDS:
        raise scaling.error(key, " or ".join(map(repr, TYPE_FIELDS)))
    return kind


def _read_llama3(config: JsonConfig, scaling: JsonConfig) -> dict[str, Any]:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if not low < high:
        raise scaling.error("high_freq_factor", f"more than low_freq_factor, {low}")
    return {
        "rope_scaling_factor": scaling.number("factor"),
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_max_seq_len": _original_max_seq_len(config, scaling),
    }


def _read_yarn(config: JsonConfig, scaling: JsonConfig) -> dict[str, Any]:
    """YaRN's fields. mscale and mscale_all_dim only serve to compute the attention factor."""
    original = _original_max_seq_len(config, scaling)
    # transformers requires the factor, but takes null for the quotient of both lengths.
    stretched = _max_position_embeddings(config) / original if "factor" in scaling.values else None
    factor = scaling.number("factor", stretched)
    fast, slow = scaling.number_or_zero("beta_fast") or BETA_FAST, scaling.number_or_zero("beta_slow") or BETA_SLOW
    if fast < slow:
        raise ValueError(
            f"{config.path}: expected {scaling.full_name('beta_fast')} of at least beta_slow, got {fast:g} and {slow:g}"
        )
    scale, scale_all = scaling.number_or_zero("mscale"), scaling.number_or_zero("mscale_all_dim")
    attention_factor = yarn_attention_factor(factor)
    if scale and scale_all:
        attention_factor = yarn_attention_factor(factor, scale) / yarn_attention_factor(factor, scale_all)
    return {
        "rope_scaling_factor": factor,
        "rope_original_max_seq_len": original,
        "rope_attention_factor": scaling.number("attention_factor", attention_factor),
        "rope_beta_fast": fast,
        "rope_beta_slow": slow,
        "rope_truncate": scaling.flag("truncate", default="truncate" not in scaling.values),  # null means false
    }


def _number_in(section: JsonConfig, config: JsonConfig, key: str, default: float) -> float:
    """The section's number, else the one outside the section, else the default. Warns if both differ."""
    inner, outer = section.number(key, default), config.number(key, default)
    if section.has(key) and config.has(key) and inner != outer:
        config.warn(f"{section.full_name(key)}={inner:g} is used, not {key}={outer:g}, as in transformers")
    return inner if section.has(key) else outer


def _max_position_embeddings(config: JsonConfig) -> int:
    return config.integer("max_position_embeddings", MAX_POSITION_EMBEDDINGS)


def _original_max_seq_len(config: JsonConfig, scaling: JsonConfig) -> int:
    """The context length before scaling. Unlike with other fields, the value outside the section goes first."""
    inner = scaling.integer(ORIGINAL_LENGTH, _max_position_embeddings(config))
    outer = config.integer(ORIGINAL_LENGTH, inner)
    if scaling.has(ORIGINAL_LENGTH) and inner != outer:
        config.warn(
            f"{ORIGINAL_LENGTH}={outer} is used, not {scaling.full_name(ORIGINAL_LENGTH)}={inner}, as in transformers"
        )
    return outer
