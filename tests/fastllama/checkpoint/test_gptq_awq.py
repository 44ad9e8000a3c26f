"""int4 checkpoints of GPTQ and AWQ, compared with their published formulas: w = scale · (q - zero)."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from fastllama.checkpoint import open_checkpoint
from fastllama.cli import main
from fastllama.kernels.quantized import QuantizedWeight
from fastllama.quantization import bytes_of
from tests.support.checkpoints import huggingface_weights, share
from tests.support.quantized_folders import PARAMS, awq_parts, gptq_parts, linear_weights, write_folder

GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
SHAPES = {module: (weight.shape[0], weight.shape[1]) for module, weight in linear_weights().items()}


def written(folder: Path, kind: str, group_size: int, **fields: Any) -> dict[str, Tensor]:
    """Write a folder whose linear modules are all quantised -> their weights by transformers' names."""
    parts, weights = {}, {}
    for seed, (module, shape) in enumerate(SHAPES.items()):
        if kind == "awq":
            parts[module], weights[module] = awq_parts(shape, group_size, seed)
        else:
            parts[module], weights[module] = gptq_parts(shape, group_size, seed, version=1 if kind == "gptq" else 2)
    base = AWQ if kind == "awq" else GPTQ | {"checkpoint_format": kind}
    write_folder(folder, base | {"group_size": group_size} | fields, parts)
    return weights


@pytest.mark.parametrize(("world_size", "group_size"), [(1, 32), (1, 64), (1, 128), (2, 128), (4, 64), (8, 32)])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "awq"])
def test_slices_are_those_of_the_formula(tmp_path: Path, kind: str, world_size: int, group_size: int) -> None:
    expected = written(tmp_path, kind, group_size)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.precisions == (f"int4 in groups of {group_size}",)
    assert checkpoint.dtype == torch.bfloat16
    whole = dict(checkpoint.tensors())
    for name, weight in whole.items():
        module = next(iter(huggingface_weights(PARAMS, {name: torch.zeros(256, 1)}))).removesuffix(".weight")
        if module in expected:
            assert isinstance(weight, QuantizedWeight) and weight.group_size == group_size
            theirs = huggingface_weights(PARAMS, {name: weight.dequantized()})[f"{module}.weight"]
            assert torch.equal(theirs, expected.pop(module)), name
        else:
            assert isinstance(weight, Tensor)
    assert not expected
    for rank in range(world_size):
        for name, part in checkpoint.dense_tensors(rank, world_size):
            weight = whole[name]
            dense = weight.dequantized() if isinstance(weight, QuantizedWeight) else weight
            assert torch.equal(part, share(PARAMS, name, dense, rank, world_size)), name


def test_one_group_for_all_columns_repeats_its_scale(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.down_proj"
    parts, expected = gptq_parts(SHAPES[module], SHAPES[module][1], seed=1)
    write_folder(tmp_path, GPTQ | {"group_size": -1}, {module: parts})
    weight = dict(open_checkpoint(tmp_path).tensors())["layers.0.feed_forward.w2.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.group_size == 128
    assert torch.equal(weight.dequantized(), expected)


def test_modules_without_words_stay_dense(tmp_path: Path) -> None:
    module = "model.layers.1.self_attn.k_proj"
    parts, _ = awq_parts(SHAPES[module], 64, seed=1)
    write_folder(tmp_path, AWQ | {"group_size": 64}, {module: parts})
    quantised = [name for name, one in open_checkpoint(tmp_path).tensors() if isinstance(one, QuantizedWeight)]
    assert quantised == ["layers.1.attention.wk.weight"]


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    parts, expected = gptq_parts(SHAPES[module], 64, seed=2)
    bias = torch.zeros(SHAPES[module][0], dtype=torch.float16)
    write_folder(tmp_path, GPTQ | {"group_size": 64}, {module: parts | {"bias": bias}})
    weight = dict(open_checkpoint(tmp_path).dense_tensors())["layers.0.feed_forward.w3.weight"]
    assert torch.equal(weight, expected)
    bias[3] = 1
    write_folder(tmp_path, GPTQ | {"group_size": 64}, {module: parts | {"bias": bias}})
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.0\.mlp\.up_proj\.bias; config"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8}, r"field 'quantization_config\.bits': expected 4, got 8"),
        ({"group_size": 48}, "expected a multiple of 32, or -1, got 48"),
        ({"group_size": "64"}, "expected an integer"),
        ({"checkpoint_format": "marlin"}, "expected one of gptq, gptq_v2, got 'marlin'"),
        ({"checkpoint_format": ["gptq"]}, "expected one of gptq, gptq_v2"),
        ({"dynamic": {"-:.*": {}}}, "'quantization_config.dynamic'"),
        ({"desc_act": 1}, "expected true or false"),
    ],
)
def test_other_settings_of_gptq_are_errors(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    module = "lm_head"
    write_folder(tmp_path, GPTQ | {"group_size": 64} | fields, {module: gptq_parts(SHAPES[module], 64, 0)[0]})
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": "gemv"}, "expected 'gemm', got 'gemv'; use the original weights"),
        ({"zero_point": False}, "expected true, got False"),
        ({"bits": None, "w_bit": 3}, "w_bit': expected 4, got 3"),
    ],
)
def test_other_settings_of_awq_are_errors(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, AWQ | {"group_size": 64} | fields, {"lm_head": awq_parts(SHAPES["lm_head"], 64, 0)[0]})
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("desc_act", [False, True])
def test_columns_in_another_order_are_an_error(tmp_path: Path, desc_act: bool) -> None:
    module = "model.layers.0.mlp.up_proj"
    parts, expected = gptq_parts(SHAPES[module], 64, seed=2)
    fields = GPTQ | {"group_size": 64, "desc_act": desc_act}
    write_folder(tmp_path, fields, {module: parts})  # the usual order, whatever desc_act says
    weights = dict(open_checkpoint(tmp_path).dense_tensors())
    assert torch.equal(weights["layers.0.feed_forward.w3.weight"], expected)
    write_folder(tmp_path, fields, {module: parts | {"g_idx": parts["g_idx"].flip(0)}})
    with pytest.raises(ValueError, match=r"up_proj has its columns in an order of their own \(act-order, desc_act\)"):
        open_checkpoint(tmp_path)
    if desc_act:
        del parts["g_idx"]
        write_folder(tmp_path, fields, {module: parts})
        with pytest.raises(ValueError, match=r"the files lack model\.layers\.0\.mlp\.up_proj\.g_idx"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "part"), [("gptq", "qweight"), ("gptq", "g_idx"), ("awq", "qzeros"), ("awq", "scales")]
)
def test_damaged_parts_are_errors(tmp_path: Path, kind: str, part: str) -> None:
    module = "model.layers.0.mlp.up_proj"
    make, fields = (awq_parts, AWQ) if kind == "awq" else (gptq_parts, GPTQ)
    parts, _ = make(SHAPES[module], 64, seed=2)
    others = {name: one for name, one in parts.items() if name != part}
    edits = [(r"expected \S+.* by", {part: parts[part][..., :-1]}), ("got F64", {part: parts[part].double()})]
    edits += [("the files lack", {})] if part != "g_idx" else []
    for message, edit in edits:
        write_folder(tmp_path, fields | {"group_size": 64}, {module: others | edit})
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_scales_that_are_not_finite_are_errors(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    module = "model.layers.0.mlp.up_proj"
    make, fields = (awq_parts, AWQ) if kind == "awq" else (gptq_parts, GPTQ)
    parts, _ = make(SHAPES[module], 64, seed=2)
    for value in (torch.nan, torch.inf):
        scales = parts["scales"].to(dtype).clone()
        scales[-1, 7] = value
        write_folder(tmp_path, fields | {"group_size": 64}, {module: parts | {"scales": scales}})
        with pytest.raises(ValueError, match=r"mlp\.up_proj has scales that are not finite; download the checkpoint"):
            dict(open_checkpoint(tmp_path).tensors())


def test_widths_that_are_not_whole_groups_are_an_error(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    write_folder(tmp_path, GPTQ | {"group_size": 512}, {module: gptq_parts(SHAPES[module], 256, seed=2)[0]})
    with pytest.raises(ValueError, match=r"q_proj: expected rows .* got \(256, 256\) in groups of 512"):
        open_checkpoint(tmp_path)


def test_weights_whose_groups_slices_would_cut_are_dequantised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, "awq", 128)
    checkpoint = open_checkpoint(tmp_path)
    whole = dict(checkpoint.dense_tensors())
    slices = [dict(checkpoint.tensors(rank, 4)) for rank in range(4)]
    name = "layers.0.attention.wo.weight"
    assert "layers.0.attention.wo.weight" in caplog.text and "dequantised" in caplog.text
    assert name in checkpoint.schemes(2) and name not in checkpoint.schemes(4)
    assert torch.equal(torch.cat([cast(torch.Tensor, one[name]) for one in slices], 1), whole[name])
    assert isinstance(slices[0]["layers.0.attention.wq.weight"], QuantizedWeight)


def test_inspect_shows_the_precision(tmp_path: Path) -> None:
    written(tmp_path, "awq", 64)
    described = CliRunner().invoke(main, ["inspect", str(tmp_path), "--json"], catch_exceptions=False)
    found = json.loads(described.output)
    n_matrices = sum(rows * columns for rows, columns in SHAPES.values())
    n_others = (PARAMS["vocab_size"] + 5) * PARAMS["dim"]
    assert found["quantized"] == ["int4 in groups of 64"] and found["parameters"] == n_matrices + n_others
    assert found["stored_dtype"] == "int4 in groups of 64"
    n_bytes = n_matrices // 2 + n_matrices // 64 * 4
    assert found["bytes_by_type"] == {"int4 in groups of 64": n_bytes, "bfloat16": n_others * 2}
    checkpoint = open_checkpoint(tmp_path)
    for rank in range(2):
        parts = {name: one for name, one in checkpoint.tensors(rank, 2) if isinstance(one, QuantizedWeight)}
        assert checkpoint.schemes(2).keys() == parts.keys()
        assert all(bytes_of(checkpoint.schemes(2)[name], one.shape) == one.n_bytes for name, one in parts.items())
    text = CliRunner().invoke(main, ["inspect", str(tmp_path)], catch_exceptions=False).output
    assert "stored in int4 in groups of 64 (" in text and "quantised  int4 in groups of 64\n" in text
