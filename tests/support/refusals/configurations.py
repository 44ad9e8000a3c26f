"""Checkpoints in a layout that fastllama reads, of models that it does not run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.bad_checkpoints import WEIGHTS, edit_tensors, huggingface, meta
from tests.support.refusals.case import MODEL, Refusal

SCALING = {"factor": 4.0, "original_max_position_embeddings": 8192}


def _config(what: str, **fields: Any) -> Refusal:
    return Refusal(f"`config.json`: {what}", partial(huggingface, MODEL, **fields))


def _params(what: str, **fields: Any) -> Refusal:
    return Refusal(f"`params.json`: {what}", partial(meta, MODEL, **fields))


def _tensors(what: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> Refusal:
    return Refusal(f"safetensors: {what}", lambda: edit_tensors(huggingface(MODEL), edit))


def _float8(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def _prefixed(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def _without_output(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def _meta_names() -> None:
    huggingface(MODEL)
    save_file(WEIGHTS, MODEL / "model.safetensors")


def _lora_parameters() -> dict[str, Any]:
    """The fields of Meta's quantised models with LoRA."""
    return {"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation"}, "lora_args": {"rank": 16}}


CASES = [
    _config("another architecture", model_type="mistral"),
    _config("another activation", hidden_act="gelu"),
    _config("heads that are rotated partly", partial_rotary_factor=0.5),
    _config("heads of an odd width", head_dim=9),
    _config("rope `dynamic`", rope_scaling={"type": "dynamic", "factor": 2.0}),
    _config("rope `longrope`", rope_scaling={**SCALING, "rope_type": "longrope"}),
    _config("rope by layer type", rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    _params("a vision model (Llama 3.2 11B and 90B)", vision_chunk_size=448, vision_max_num_chunks=4),
    _params("quantised weights (Llama 3.2 SpinQuant, QLoRA)", **_lora_parameters()),
    _params("fields of another model (Llama 4)", moe_args={"num_experts": 16}, use_qk_norm=True),
    _tensors("weights in FP8 or integers, which `config.json` does not describe", _float8),
    _tensors("the layers alone (`AutoModel`), without an output", _without_output),
    _tensors("names with another program's prefix", _prefixed),
    Refusal("safetensors: Meta's names", _meta_names),
]
