"""Reads the rotary embedding of a GGUF file as ModelArgs fields: the metadata's scaling and the tensor of factors.

The fields mean what they mean in llama.cpp for the architecture llama, except that it ignores YaRN's betas.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs, yarn_attention_factor
from fastllama.checkpoint.json_config import JsonConfig, short_repr
from fastllama.rope import rope_frequencies

PREFIX = "llama.rope."
CONTEXT_LENGTH = "llama.context_length"
ORIGINAL_LENGTH = "scaling.original_context_length"
ROPE_FACTORS_NAME = "rope_freqs.weight"
ROPE_THETA = 10000.0  # llama.cpp's default
TYPES = ("none", "linear", "yarn")
FACTORS_TOLERANCE = 1e-3  # relative
ATTENTION_TOLERANCE = 1e-4  # relative


def read_rope(config: JsonConfig) -> dict[str, Any]:
    """The fields that the metadata gives. Without a type, a scaling factor is linear, as in llama.cpp.

    ValueError for a type or a value that fastllama does not support.
    """
    named = {name.removeprefix(PREFIX): value for name, value in config.values.items() if name.startswith(PREFIX)}
    rope = JsonConfig(config.path, named, PREFIX)
    kind = rope.values.get("scaling.type", "linear")
    if kind not in TYPES:
        raise rope.error("scaling.type", " or ".join(map(repr, TYPES)))
    fields: dict[str, Any] = {"rope_theta": rope.number("freq_base", ROPE_THETA), "use_scaled_rope": False}
    # 0 is llama.cpp's value for no scaling; "scale_linear" is the old name.
    factor = rope.number_or_zero("scaling.factor" if rope.has("scaling.factor") else "scale_linear") or 1.0
    attention_factor = rope.number("scaling.attn_factor", 1.0)
    if kind == "yarn":
        return fields | _read_yarn(config, rope, factor, attention_factor)
    if attention_factor != 1:
        raise rope.error("scaling.attn_factor", f"1 with the scaling type {kind!r}")
    if kind == "linear" and factor != 1:
        fields |= {"rope_type": "linear", "rope_scaling_factor": factor}
    return fields


def _read_yarn(config: JsonConfig, rope: JsonConfig, factor: float, attention_factor: float) -> dict[str, Any]:
    """YaRN's fields. attention_factor multiplies the one that follows from the factor."""
    if rope.number("freq_base", ROPE_THETA) <= 1:
        raise rope.error("freq_base", "more than 1 with the scaling type 'yarn'")
    original = rope.integer(ORIGINAL_LENGTH) if rope.values.get(ORIGINAL_LENGTH) else config.integer(CONTEXT_LENGTH)
    fast = rope.number("scaling.yarn_beta_fast", ModelArgs.rope_beta_fast)
    slow = rope.number("scaling.yarn_beta_slow", ModelArgs.rope_beta_slow)
    if fast < slow:
        raise rope.error("scaling.yarn_beta_slow", f"at most yarn_beta_fast, {fast:g}")
    if (fast, slow) != (ModelArgs.rope_beta_fast, ModelArgs.rope_beta_slow):
        rope.warn(f"YaRN's betas {fast:g} and {slow:g} are used, as stated; llama.cpp does not read them")
    own_factor = yarn_attention_factor(factor)
    _refuse_other_yarn(rope, own_factor)
    return {
        "rope_type": "yarn",
        "rope_scaling_factor": factor,
        "rope_original_max_seq_len": original,
        "rope_attention_factor": own_factor * attention_factor,
        "rope_beta_fast": fast,
        "rope_beta_slow": slow,
    }


def _refuse_other_yarn(rope: JsonConfig, own_factor: float) -> None:
    """Raise ValueError for fields that ask for another formula. llama.cpp ignores them in this architecture."""
    key = "scaling.yarn_ext_factor"
    if rope.has(key) and rope.values[key] not in (1, -1):  # -1: not set
        raise rope.error(key, "1 (YaRN's share of unscaled frequencies is supported only in full)")
    key = "scaling.yarn_log_multiplier"
    if rope.number_or_zero(key):
        raise rope.error(key, "0 (the attention factor of other architectures is not supported)")
    # Converters write the product that follows from the factor, or 1 for "not changed".
    key = "scaling.yarn_attn_factor"
    stated = rope.number(key, 1.0)
    if stated != 1 and not math.isclose(stated, own_factor, rel_tol=ATTENTION_TOLERANCE):
        raise rope.error(key, f"1, or {own_factor:.6g}, which follows from the scaling factor")


def apply_factors(path: Path, params: Mapping[str, Any], factors: torch.Tensor) -> dict[str, Any]:
    """The fields that divide each frequency by its factor besides the scaling in `params`. ValueError for bad factors.

    Factors of Llama 3.1's form give scaled rope: the largest is its scaling factor, and the other fields are those of
    all of Meta's models.
    """
    n_frequencies = params["head_dim"] // 2
    if factors.shape != (n_frequencies,):
        raise ValueError(
            f"{path}: tensor {ROPE_FACTORS_NAME}: expected {n_frequencies} factors, one for each frequency, "
            f"got the shape {tuple(factors.shape)}"
        )
    if bool(torch.all(factors == 1)):
        return {}
    args = ModelArgs(**params)
    plain = ModelArgs(**{**params, "rope_type": "default"})
    scaling = rope_frequencies(plain).double() / rope_frequencies(args).double()
    fields = {
        "rope_type": "factors",
        "rope_factors": tuple((factors.double() * scaling).tolist()),
        "rope_attention_factor": args.rope_attention_factor,
    }
    try:
        scaled = ModelArgs(**{**params, **fields})
    except ValueError as error:
        raise ValueError(
            f"{path}: tensor {ROPE_FACTORS_NAME}: {error}, from {short_repr(factors[:4].tolist())} and on"
        ) from None
    llama3 = {"use_scaled_rope": True, "rope_scaling_factor": float(factors.max())}
    if args.rope_type == "default" and _same_frequencies(scaled, ModelArgs(**{**params, **llama3})):
        return llama3
    return fields


def _same_frequencies(one: ModelArgs, other: ModelArgs) -> bool:
    return torch.allclose(rope_frequencies(one), rope_frequencies(other), rtol=FACTORS_TOLERANCE, atol=0)
