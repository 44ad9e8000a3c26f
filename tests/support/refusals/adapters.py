"""Adapters that cannot be merged, and adapters in the place of a model."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.adapters import factor_tensors, random_factors, write_adapter
from tests.support.bad_checkpoints import PARAMS, WEIGHTS, meta
from tests.support.checkpoints import random_weights, tiny_params
from tests.support.refusals.case import ADAPTER, MODEL, Refusal, build

TENSORS = factor_tensors(random_factors(PARAMS, WEIGHTS, ["q_proj", "v_proj"], seed=0))
FILE = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0"
# Tensors with each part that is refused.
REFUSED_PARTS = ("lora_magnitude_vector", "modules_to_save", "lora_B.bias")
# A value of every field that is refused.
REFUSED_FIELDS: dict[str, Any] = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2], [1, 2]],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.experts.down_proj"],
    "use_qalora": True,
    "use_bdlora": True,
    "alora_invocation_tokens": [128006, 78191],
    "arrow_config": {"top_k": 3},
    "ensure_weight_tying": True,
}


def _write(tensors: Mapping[str, Tensor] = TENSORS, **fields: Any) -> None:
    meta(MODEL)
    write_adapter(ADAPTER, dict(tensors), **fields)


def _other_base() -> None:
    other = tiny_params(dim=128)
    _write(factor_tensors(random_factors(other, random_weights(other), ["q_proj"], seed=0)))


def _pickled() -> None:
    _write()
    torch.save(load_file(ADAPTER / FILE), ADAPTER / "adapter_model.bin")
    (ADAPTER / FILE).unlink()


def _mlx() -> None:
    _write(peft_type=...)
    (ADAPTER / FILE).rename(ADAPTER / "adapters.safetensors")


def _alone(**fields: Any) -> Refusal:
    kind = fields["peft_type"]
    return Refusal(
        f"an adapter ({kind}) in the place of the model",
        partial(write_adapter, MODEL, TENSORS, base_model_name_or_path="meta-llama/Llama-3.2-1B", **fields),
        error=AssertionError,
    )


def _case(what: str, *args: Any, **fields: Any) -> Refusal:
    write = args[0] if args and callable(args[0]) else partial(_write, *args, **fields)
    return Refusal(what, write, partial(build, adapter=str(ADAPTER)))


COMPLETE = {"base_model.model.lm_head.weight": WEIGHTS["output.weight"] + 1}
FUSED = {f"{LAYER}.self_attn.qkv_proj.lora_A.weight": torch.zeros(4, 64)}
CASES = [
    _alone(peft_type="LORA"),
    _alone(peft_type="IA3"),
    _case("another kind of adapter than LoRA", peft_type="IA3"),
    *(_case(f"`{field}`", **{field: value}) for field, value in REFUSED_FIELDS.items()),
    *(
        _case(f"tensors with `{name}` in their names", {**TENSORS, f"{LAYER}.self_attn.q_proj.{name}": torch.zeros(4)})
        for name in REFUSED_PARTS
    ),
    _case("a start that changes the base (PiSSA, OLoRA, CorDA, LoftQ)", init_lora_weights="pissa"),
    _case("a field that is not known here", new_kind_of_lora={"a": 1}),
    _case("an expression that cannot be read", target_modules="(.*(q|v)_proj"),
    _case("an embedding or output that was trained completely", {**TENSORS, **COMPLETE}),
    _case("modules of another architecture", {**TENSORS, **FUSED}),
    _case("an adapter of a base of another size", _other_base),
    _case("a pickled `adapter_model.bin`", _pickled),
    _case("an adapter of MLX", _mlx),
]
