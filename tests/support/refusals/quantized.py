"""Quantised checkpoints whose weights are not read as they are."""

from functools import partial
from typing import Any

import torch

from fastllama.checkpoint import open_checkpoint
from fastllama.checkpoint.quantized_writer import write_quantized
from fastllama.checkpoint.quantized_writer_config import model_config
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.quantized_folders import PARAMS, Parts, awq_parts, gptq_parts, linear_weights, write_folder
from tests.support.refusals.case import MODEL, Refusal, build

MODULE = "model.layers.0.mlp.down_proj"
ROWS, COLUMNS = linear_weights()[MODULE].shape
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def _write(quantization: dict[str, Any], parts: Parts | None = None) -> None:
    write_folder(MODEL, quantization, {MODULE: parts} if parts else {})


def _method(name: str, **fields: Any) -> Refusal:
    return Refusal(f"`quant_method` {name}", partial(_write, {"quant_method": name, **fields}))


def _configuration(target: str, weights: dict[str, Any], layout: str) -> dict[str, Any]:
    groups = {"group_0": {"targets": [target], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def _compressed(what: str, weights: dict[str, Any], layout: str, **fields: Any) -> Refusal:
    return Refusal(f"compressed-tensors: {what}", partial(_write, _configuration("Linear", weights, layout) | fields))


def _int4(zero: int, scale: float) -> None:
    """One module of compressed-tensors in a symmetric scheme, with these zero points and scales."""
    parts = {
        "weight_packed": torch.zeros(ROWS, COLUMNS // 8, dtype=torch.int32),
        "weight_scale": torch.full((ROWS, COLUMNS // 128), scale),
        "weight_zero_point": torch.full((ROWS, COLUMNS // 128), zero, dtype=torch.int8),
    }
    _write(_configuration(MODULE, INT4, "pack-quantized"), parts)


def _read() -> None:
    for _ in open_checkpoint(MODEL).tensors(progress=False):
        pass


def _gptq(what: str, **fields: Any) -> Refusal:
    return Refusal(f"GPTQ: {what}", partial(_write, GPTQ | fields))


def _awq(what: str, **fields: Any) -> Refusal:
    return Refusal(f"AWQ: {what}", partial(_write, AWQ | fields))


def _good() -> None:
    _write(AWQ, awq_parts((ROWS, COLUMNS), 128, seed=0)[0])


def _act_order() -> None:
    parts = gptq_parts((ROWS, COLUMNS), 128, seed=0)[0]
    _write(GPTQ | {"desc_act": True}, parts | {"g_idx": parts["g_idx"].flip(0)})


def _odd_groups() -> None:
    _write(GPTQ | {"group_size": 1024}, gptq_parts((ROWS, COLUMNS), 128, seed=0)[0])


def _rope_factors() -> None:
    rope = {"rope_type": "factors", "rope_factors": [1.0] * 16, "use_scaled_rope": False}
    write_meta(MODEL, PARAMS | rope, random_weights(PARAMS, seed=5))


def _quantize() -> None:
    checkpoint = open_checkpoint(MODEL)
    config, out = model_config(checkpoint), MODEL.with_name("out")
    write_quantized(checkpoint, out, "int4", with_output=False, config=config, copy_others=lambda folder: None)


def _dense() -> None:
    params = tiny_params()
    write_meta(MODEL, params, random_weights(params))
    write_tokenizer(MODEL)


CASES = [
    _method("bitsandbytes", load_in_4bit=True),
    _method("fp8", weight_block_size=[128, 128]),
    _method("modelopt", quant_algo="NVFP4"),
    _compressed("a block of the matrix has a scale", FP8 | {"strategy": "block"}, "float-quantized"),
    _compressed("4-bit floats", FP8 | {"num_bits": 4, "strategy": "tensor_group"}, "nvfp4-pack-quantized"),
    _compressed("other numbers of bits", INT4 | {"num_bits": 3}, "pack-quantized"),
    _compressed("int8 with zero points", INT8 | {"symmetric": False}, "int-quantized"),
    Refusal("compressed-tensors: zero points in a symmetric scheme", partial(_int4, zero=3, scale=1.0)),
    Refusal("compressed-tensors: scales of groups beyond float16", partial(_int4, zero=0, scale=1e6), _read),
    _compressed("act-order", INT4 | {"actorder": "group"}, "pack-quantized"),
    _compressed("an expression that cannot be read", INT4, "pack-quantized", ignore=["re:(.*lm_head"]),
    _compressed("groups of other sizes", INT4 | {"group_size": 48}, "pack-quantized"),
    _compressed("a quantised cache", FP8, "float-quantized", kv_cache_scheme=FP8 | {"strategy": "tensor"}),
    _compressed("sparse weights", FP8, "float-quantized", sparsity_config={"format": "sparse-24-bitmask"}),
    _compressed("rotated weights", INT4, "pack-quantized", transform_config={"config_groups": {"R1": {}}}),
    _compressed("a quantised embedding", {}, "int-quantized", config_groups={"a": {"targets": ["Embedding"]}}),
    _compressed("schemes without the weights that they describe", INT8, "int-quantized"),
    _gptq("other numbers of bits", bits=8),
    _gptq("other layouts, such as Marlin's", checkpoint_format="marlin"),
    _gptq("a setting for each module", dynamic={"+:.*down.*": {"bits": 8}}),
    Refusal("GPTQ: act-order", _act_order),
    Refusal("GPTQ: groups that are wider than the matrix", _odd_groups),
    _awq("other versions", version="gemv"),
    _awq("weights without zero points", zero_point=False),
    Refusal("`quantize=` of another kind", _dense, partial(build, quantize="nf4")),
    Refusal('`quantize="int4"` and columns that 32 does not divide', _dense, partial(build, quantize="int4")),
    Refusal("`fastllama quantize` of a quantised checkpoint", _good, _quantize),
    Refusal("`fastllama quantize` of a rope that transformers lacks", _rope_factors, _quantize),
]
