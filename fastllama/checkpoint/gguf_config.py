"""Reads the metadata of a GGUF file as ModelArgs fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.checkpoint.base import check_dims
from fastllama.checkpoint.json_config import MAX_LAYERS, JsonConfig, short_repr
from fastllama.rope import rope_frequencies

ARCHITECTURE = "llama"
ROPE_THETA = 10000.0  # llama.cpp's default
ROPE_FACTORS_NAME = "rope_freqs.weight"
FACTORS_TOLERANCE = 1e-3  # relative


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
        "rope_theta": config.number(_key("rope.freq_base"), ROPE_THETA),
        "use_scaled_rope": False,
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
    if config.number(_key("rope.scale_linear"), 1.0) != 1.0:
        raise config.error(_key("rope.scale_linear"), "1 (linear scaling of positions is not supported in GGUF files)")
    scaling = config.values.get(_key("rope.scaling.type"))
    unscaled = scaling == "linear" and config.number(_key("rope.scaling.factor"), 1.0) == 1.0
    if scaling not in (None, "none") and not unscaled:
        raise config.error(_key("rope.scaling.type"), f"'none' (Llama 3.1's scaling is the tensor {ROPE_FACTORS_NAME})")


def scaled_rope(path: Path, params: Mapping[str, Any], factors: torch.Tensor) -> dict[str, Any]:
    """The fields of scaled rope that have these factors, what each frequency is divided by.

    The largest factor is Llama 3.1's scaling factor; the other fields are those of all of Meta's models. ValueError if
    that does not give the same factors.
    """
    if factors.shape == (params["head_dim"] // 2,) and bool(torch.all(factors == 1)):
        return {"use_scaled_rope": False}
    values = factors[torch.isfinite(factors) & (factors > 0)]
    if factors.shape == (params["head_dim"] // 2,) and len(values) == len(factors):
        scaled = {"use_scaled_rope": True, "rope_scaling_factor": float(values.max())}
        expected = rope_frequencies(ModelArgs(**params)) / rope_frequencies(ModelArgs(**{**params, **scaled}))
        if torch.allclose(expected.to(factors.dtype), factors, rtol=FACTORS_TOLERANCE):
            return scaled
    raise ValueError(
        f"{path}: {ROPE_FACTORS_NAME} does not hold the factors of Llama 3.1's scaled rope for "
        f"{params['head_dim'] // 2} frequencies, got {short_repr(factors.flatten()[:4].tolist())} and on; "
        "other scalings are not supported in GGUF files"
    )
