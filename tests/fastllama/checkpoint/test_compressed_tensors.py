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
from tests.support.compressed_folders import FP8, INT8, KINDS, LINEAR, NEEDED, compressed, configuration, dequantised
from tests.support.quantized_folders import PARAMS, write_folder

pytestmark = NEEDED


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
