"""Folders of compressed-tensors, whose weights the package itself packs and unpacks."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import Llama
from fastllama.checkpoint import open_checkpoint
from fastllama.kernels.quantized import QuantizedWeight
from tests.support.checkpoints import huggingface_weights, share, write_tokenizer
from tests.support.quantized_folders import PARAMS, Parts, linear_weights, write_folder

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: pip install compressed-tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

LINEAR = linear_weights()
INT8, FP8 = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
# (format, the weights' arguments, what it is in memory)
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fp8-channel": ("float-quantized", FP8 | {"strategy": "channel"}, "fp8 by row"),
    "fp8-tensor": ("naive-quantized", FP8 | {"strategy": "tensor"}, "fp8 by row"),
    "int8-channel": ("int-quantized", INT8 | {"strategy": "channel"}, "int8 by row"),
    "int8-tensor": ("naive-quantized", INT8 | {"strategy": "tensor"}, "int8 by row"),
    "int8-group": ("int-quantized", INT8 | {"strategy": "group", "group_size": 64}, "int8 in groups of 64"),
    "int8-packed": ("pack-quantized", INT8 | {"strategy": "channel"}, "int8 by row"),
    "int8-packed-group": ("pack-quantized", INT8 | {"strategy": "group", "group_size": 128}, "int8 in groups of 128"),
    "int4-128": ("pack-quantized", INT4 | {"group_size": 128}, "int4 in groups of 128"),
    "int4-64-zeros": ("pack-quantized", INT4 | {"group_size": 64, "symmetric": False}, "int4 in groups of 64"),
    "int4-32-zeros": ("pack-quantized", INT4 | {"group_size": 32, "symmetric": False}, "int4 in groups of 32"),
    "int4-256": ("pack-quantized", INT4 | {"group_size": 256, "symmetric": False}, "int4 in groups of 128"),
    "int4-channel": ("pack-quantized", INT4 | {"strategy": "channel", "symmetric": False}, "int4 in groups of 128"),
    "int4-tensor": ("pack-quantized", INT4 | {"strategy": "tensor"}, "int4 in groups of 128"),
}


def compressed(weight: Tensor, layout: str, fields: dict[str, Any], dtype: torch.dtype = torch.float16) -> Parts:
    """A matrix as the package stores it, with simple scales in this dtype."""
    arguments = QuantizationArgs(**fields)
    groups = weight.shape[1] // (arguments.group_size or weight.shape[1])
    grouped = weight.view(1, 1, -1) if arguments.strategy == "tensor" else weight.view(weight.shape[0], groups, -1)
    largest = grouped.abs().amax(-1)
    top = 448.0 if arguments.type == "float" else 2.0 ** (arguments.num_bits - 1) - 1
    parts = {"weight": weight, "weight_scale": (largest / top).to(dtype)}
    if arguments.strategy == "tensor":
        parts["weight_scale"] = parts["weight_scale"].view(1)
    if not arguments.symmetric:
        generator = torch.Generator().manual_seed(3)
        parts["weight_zero_point"] = torch.randint(-8, 8, largest.shape, generator=generator).to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    stored: Parts = BaseCompressor.get_value_from_registry(layout).compress(parts, scheme)
    return stored


def dequantised(parts: Parts, layout: str, fields: dict[str, Any]) -> Tensor:
    """The matrix as the package unpacks it, with scales in float32."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**fields))
    wide = parts | {"weight_scale": parts["weight_scale"].float()}
    weight: Tensor = BaseCompressor.get_value_from_registry(layout).decompress(wide, scheme)["weight"]
    return weight.float()


def configuration(layout: str, fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": fields}
    fixed = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": []}
    return fixed | {"format": layout, "config_groups": {"group_0": group}} | changes


def written(folder: Path, kind: str, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Write a folder whose linear modules are all quantised -> their weights by transformers' names."""
    layout, fields, _ = KINDS[kind]
    parts = {module: compressed(weight, layout, fields, dtype) for module, weight in LINEAR.items()}
    write_folder(folder, configuration(layout, fields), parts)
    return {module: dequantised(one, layout, fields) for module, one in parts.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_package_unpacks(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    expected = written(tmp_path, kind, dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.precisions == (KINDS[kind][2],)
    whole = dict(checkpoint.tensors())
    received = {name: one.dequantized() for name, one in whole.items() if isinstance(one, QuantizedWeight)}
    theirs = huggingface_weights(PARAMS, received)
    assert theirs.keys() == {f"{module}.weight" for module in expected}
    for module, weight in expected.items():
        assert torch.equal(theirs[f"{module}.weight"], weight), module
    by_group = "groups" in KINDS[kind][2]
    scales = {one.scales.dtype for one in whole.values() if isinstance(one, QuantizedWeight)}
    assert scales == ({dtype} if by_group else {torch.float32})


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("fp8-channel", 8), ("int8-tensor", 8), ("int8-packed", 8), ("int4-32-zeros", 8), ("int4-channel", 2)],
)
def test_slices_are_those_of_the_weights(tmp_path: Path, kind: str, world_size: int) -> None:
    written(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    whole = dict(checkpoint.dense_tensors())
    for rank in range(world_size):
        for name, part in checkpoint.dense_tensors(rank, world_size):
            assert torch.equal(part, share(PARAMS, name, whole[name], rank, world_size)), name


def test_float32_scales_of_groups_are_rounded_to_float16(tmp_path: Path) -> None:
    written(tmp_path, "int4-64-zeros", torch.float32)
    weight = dict(open_checkpoint(tmp_path).tensors())["layers.1.feed_forward.w2.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.scales.dtype == torch.float16
    layout, fields, _ = KINDS["int4-64-zeros"]
    stored = compressed(LINEAR["model.layers.1.mlp.down_proj"], layout, fields, torch.float32)
    assert torch.equal(weight.scales, stored["weight_scale"].half())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_may_have_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    layout, fields, _ = KINDS["fp8-tensor"]
    stored = compressed(LINEAR["lm_head"], layout, fields)
    expected = dequantised(stored, layout, fields)
    stored["weight_scale"] = stored["weight_scale"].view(shape)
    group = {"targets": ["lm_head"], "weights": fields}
    write_folder(tmp_path, configuration(layout, fields, config_groups={"a": group}), {"lm_head": stored})
    assert torch.equal(dict(open_checkpoint(tmp_path).dense_tensors())["output.weight"], expected)


def test_every_module_has_its_own_scheme(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names go before expressions, expressions before the class, and `ignore` before all."""
    int4 = KINDS["int4-128"][1]
    groups: dict[str, Any] = {
        "a": {"targets": ["Linear"], "weights": INT8 | {"strategy": "channel"}},
        "b": {
            "targets": [r"re:.*\.mlp\.(up|gate)_proj$"],
            "weights": FP8 | {"strategy": "channel"},
            "format": "float-quantized",
            "input_activations": FP8 | {"strategy": "tensor", "dynamic": False},
        },
        "c": {"targets": ["model.layers.0.mlp.up_proj"], "weights": int4, "format": "pack-quantized"},
    }
    layouts = {"a": "int-quantized", "b": "float-quantized", "c": "pack-quantized"}
    ignored = ["lm_head", r"re:model\.layers\.1\.self_attn\..*"]
    parts = {}
    for module, weight in LINEAR.items():
        if module == "lm_head" or module.startswith("model.layers.1.self_attn"):
            continue
        group = "c" if module == "model.layers.0.mlp.up_proj" else "b" if "up" in module or "gate" in module else "a"
        parts[module] = compressed(weight, layouts[group], groups[group]["weights"])
        if group == "b":
            parts[module]["input_scale"] = torch.ones(1)
    fields = configuration("int-quantized", {}, config_groups=groups, ignore=ignored)
    caplog.set_level(logging.INFO, "fastllama")
    checkpoint = open_checkpoint(write_folder(tmp_path, fields, parts))
    assert f"{tmp_path}: quantised activations are ignored; they stay in the dtype of the model" in caplog.messages
    formats = {name: one.format if isinstance(one, QuantizedWeight) else "" for name, one in checkpoint.tensors()}
    assert formats["layers.0.feed_forward.w3.weight"] == "int4"
    assert formats["layers.1.feed_forward.w3.weight"] == formats["layers.0.feed_forward.w1.weight"] == "fp8"
    assert formats["layers.0.attention.wq.weight"] == formats["layers.1.feed_forward.w2.weight"] == "int8"
    assert formats["layers.1.attention.wq.weight"] == formats["output.weight"] == ""
    assert checkpoint.precisions == ("int8 by row", "fp8 by row", "int4 in groups of 128")


@pytest.mark.parametrize("kind", ["fp8-channel", "int8-packed", "int4-32-zeros"])
def test_logits_are_transformers_with_the_packages_weights(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    written(tmp_path, kind, torch.float32)  # so that the package unpacks in float32
    tokenizer = write_tokenizer(tmp_path, n_ranks=PARAMS["vocab_size"] - 256)
    how = CompressedTensorsConfig(dequantize=True)  # transformers 5.23 loads zero points in no other way
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=how).eval()
    tokens = torch.randint(0, PARAMS["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "backend": "reference"}
    llm = Llama.build(str(tmp_path), str(tokenizer), 16, 2, **options)
    # float32 scales of groups are rounded to float16 in memory.
    tolerance = 2e-2 if kind.startswith("int4") else 1e-4
    torch.testing.assert_close(llm.model.forward(tokens, 0), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"strategy": "block", "block_structure": [128, 128]},
            "expected one of tensor, channel, group, got 'block'",
        ),
        (
            {"strategy": "tensor_group", "group_size": 16},
            "got 'tensor_group'; use the original weights, with",
        ),
        ({"num_bits": 4, "type": "float"}, r"weights\.num_bits': expected 8 bits of int or float, .* got 4 of 'float'"),
        ({"num_bits": 3, "type": "int", "strategy": "channel"}, "got 3 of 'int'"),
        ({"num_bits": [8]}, "expected an integer"),
        ({"type": {}}, "expected 8 bits"),
        ({"actorder": "group", **INT8, "strategy": "channel"}, "expected 'static' or null"),
        ({"symmetric": False, **INT8, "strategy": "channel"}, "expected true, as int8 has no zero points here"),
        ({**INT8, "strategy": "group", "group_size": 48}, "expected a multiple of 32, got 48"),
        ({**INT8, "strategy": "group"}, r"group_size': expected an integer .* it is missing"),
    ],
)
def test_other_schemes_are_errors(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    layout = "float-quantized" if fields.get("type") != "int" else "pack-quantized"
    write_folder(tmp_path, configuration(layout, fields), {})
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_scheme": FP8}, r"kv_cache_scheme': expected nothing: it changes the cache"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"format": "nvfp4-pack-quantized"}, "expected one of int-quantized, .* got 'nvfp4-pack-quantized'"),
        ({"format": "dense"}, "got 'dense'"),
        ({"config_groups": {}}, "expected an object of schemes"),
        ({"config_groups": {"W8A8": ["Linear"]}}, "'quantization_config.config_groups.W8A8'"),
        ({"config_groups": {"a": {"targets": ["re:("], "weights": INT8}}}, r"valid expressions"),
        ({"config_groups": {"a": {"targets": "Linear", "weights": INT8}}}, r"expected a list of texts, got 'Linear'"),
        ({"config_groups": {"a": {"targets": ["Embedding"], "weights": INT8}}}, "the embedding is not quantised"),
        ({"ignore": [1]}, "expected a list of texts"),
        ({}, r"describes lm_head as quantised, and the files lack lm_head\.weight_scale"),
    ],
)
def test_damaged_configurations_are_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    fields = INT8 | {"strategy": "channel"}
    parts = {module: compressed(one, "int-quantized", fields) for module, one in LINEAR.items() if module != "lm_head"}
    write_folder(tmp_path, configuration("int-quantized", fields) | changes, parts)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("int4-64-zeros", "weight_scale", r"lm_head\.weight_scale: expected F16 or BF16 or F32 \(584, 4\) by config"),
        ("int4-64-zeros", "weight_packed", r"weight_packed: expected I32 \(584, 32\)"),
        ("int4-64-zeros", "weight_zero_point", r"weight_zero_point: expected I32 \(73, 4\)"),
        ("int8-channel", "weight", r"lm_head\.weight: expected I8 \(584, 256\)"),
        ("int8-channel", "weight_scale", r"weight_scale: expected .* \(584, 1\)"),
    ],
)
def test_damaged_parts_are_errors(tmp_path: Path, kind: str, part: str, message: str) -> None:
    layout, fields, _ = KINDS[kind]
    stored = compressed(LINEAR["lm_head"], layout, fields)
    group = {"targets": ["lm_head"], "weights": fields}
    fields = configuration(layout, fields, config_groups={"a": group})
    open_checkpoint(write_folder(tmp_path, fields, {"lm_head": stored}))
    for damaged in (stored[part][:-1], stored[part].to(torch.int16)):
        write_folder(tmp_path, fields, {"lm_head": stored | {part: damaged}})
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path)
    if layout == "pack-quantized":
        write_folder(tmp_path, fields, {"lm_head": stored | {"weight_shape": torch.tensor([584, 255])}})
        with pytest.raises(ValueError, match=r"lm_head: expected \(584, 255\), got \(584, 256\)"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_fp8_weights_that_are_not_numbers_are_errors(tmp_path: Path, bits: int) -> None:
    layout, fields, _ = KINDS["fp8-channel"]
    stored = compressed(LINEAR["lm_head"], layout, fields)
    stored["weight"].view(torch.uint8)[3, 5] = bits
    group = {"targets": ["lm_head"], "weights": fields}
    write_folder(tmp_path, configuration(layout, fields, config_groups={"a": group}), {"lm_head": stored})
    with pytest.raises(ValueError, match=r"lm_head holds fp8 weights that are not numbers \(NaN\)"):
        dict(open_checkpoint(tmp_path).tensors())
