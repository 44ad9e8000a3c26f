"""Folders of compressed-tensors that are damaged, contradict themselves, or have what is not read."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.checkpoint import open_checkpoint
from fastllama.kernels.quantized import QuantizedWeight
from tests.support.compressed_folders import FP8, INT8, KINDS, LINEAR, NEEDED, compressed, configuration, dequantised
from tests.support.quantized_folders import write_folder

pytestmark = NEEDED


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
        ({"actorder": "group", **INT8, "strategy": "channel"}, "expected null, false, 'static' or 'weight'"),
        ({"actorder": "x", **INT8, "strategy": "channel"}, "expected null, false, .* got 'x'"),
        ({"actorder": True, **INT8, "strategy": "channel"}, "expected null, false, .* got True"),
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
        (
            {"config_groups": {"a": {"targets": ["re:("], "weights": INT8}}},
            r"config_groups\.a\.targets': expected names or .*, got 're:\(': missing \)",
        ),
        ({"ignore": ["re:[lm_head"]}, r"quantization_config\.ignore': expected names or .* got 're:\[lm_head'"),
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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["fp8-channel", "int8-tensor", "int8-group", "int4-64-zeros"])
def test_scales_that_are_not_finite_are_errors(tmp_path: Path, kind: str, dtype: torch.dtype, value: float) -> None:
    layout, fields, _ = KINDS[kind]
    stored = compressed(LINEAR["lm_head"], layout, fields, dtype)
    stored["weight_scale"].view(-1)[-1] = value
    group = {"targets": ["lm_head"], "weights": fields}
    write_folder(tmp_path, configuration(layout, fields, config_groups={"a": group}), {"lm_head": stored})
    with pytest.raises(ValueError, match=r": lm_head has scales that are not finite; download the checkpoint again"):
        dict(open_checkpoint(tmp_path).tensors())


@pytest.mark.parametrize("kind", ["int8-group", "int4-64-zeros", "int8-channel"])
def test_scales_of_groups_that_float16_cannot_hold_are_errors(tmp_path: Path, kind: str) -> None:
    """A scale per row stays in float32."""
    held, lost = (0, 6e4, 2.0**-23, 1e-5), (1e6, 2e-7, 1e-9)
    layout, fields, in_memory = KINDS[kind]
    group = {"targets": ["lm_head"], "weights": fields}
    for value in (*held, *lost):
        stored = compressed(LINEAR["lm_head"], layout, fields, torch.float32)
        stored["weight_scale"][5, 0] = value
        write_folder(tmp_path, configuration(layout, fields, config_groups={"a": group}), {"lm_head": stored})
        checkpoint = open_checkpoint(tmp_path)
        if value in held or "row" in in_memory:
            weight = dict(checkpoint.tensors())["output.weight"]
            assert isinstance(weight, QuantizedWeight)
            assert float(weight.scales[5, 0]) == pytest.approx(value, rel=0.01)
            continue
        message = rf"lm_head has scales of groups such as {re.escape(f'{value:.3g}')}, .* within 1%; use the"
        with pytest.raises(ValueError, match=message):
            dict(checkpoint.tensors())


@pytest.mark.parametrize("kind", ["fp8-channel", "int8-channel", "int8-packed", "int8-packed-group", "int4-128"])
def test_zero_points_of_a_symmetric_scheme_must_change_nothing(tmp_path: Path, kind: str) -> None:
    layout, fields, _ = KINDS[kind]
    stored = compressed(LINEAR["lm_head"], layout, fields)
    group = {"targets": ["lm_head"], "weights": fields}
    rows, groups = stored["weight_scale"].shape
    neutral = [torch.zeros(rows, groups, dtype=dtype) for dtype in (torch.int8, torch.int32, torch.float32)]
    if layout == "pack-quantized":
        word = {4: -0x77777778, 8: -0x7F7F7F80}[fields["num_bits"]]
        neutral.append(torch.full((-(-rows * fields["num_bits"] // 32), groups), word, dtype=torch.int32))
    expected = dequantised(stored, layout, fields)
    for zeros in neutral:
        for change in (0, 1):
            zeros[-1, -1] += change
            parts = {"lm_head": stored | {"weight_zero_point": zeros}}
            write_folder(tmp_path, configuration(layout, fields, config_groups={"a": group}), parts)
            if not change:
                assert torch.equal(dict(open_checkpoint(tmp_path).dense_tensors())["output.weight"], expected)
                continue
            with pytest.raises(ValueError, match="lm_head: config.json describes .* as symmetric, and .* changes them"):
                open_checkpoint(tmp_path)
