"""Errors of opening a checkpoint, for its folder and its JSON: they name the file and the field."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import WEIGHTS, good, huggingface, indexed, meta, next_call_works, refused

__all__ = ["good", "next_call_works"]  # fixtures

# Nothing to open


@pytest.mark.parametrize("name", ["nowhere", "x" * 300], ids=["missing", "long"])
def test_open_rejects_a_missing_folder(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name, name, "does not exist", error=AssertionError)


@pytest.mark.parametrize("write", [meta, huggingface, indexed])
@pytest.mark.parametrize("name", [b"d\xe9\xff", b"\x80"], ids=repr)
def test_open_rejects_a_path_that_is_not_utf_8(tmp_path: Path, write: Callable[[Path], Path], name: bytes) -> None:
    plain, folder = tmp_path / "plain", tmp_path / os.fsdecode(name)
    plain.mkdir()
    file = open_checkpoint(write(plain)).files[0][0].name
    plain.rename(folder)
    with pytest.raises(ValueError, match="expected a path in UTF-8") as caught:
        open_checkpoint(folder)
    assert str(caught.value) == (
        f"{str(folder / file)!r}: expected a path in UTF-8, as torch and safetensors need it to map a file; "
        "rename the folder or the file"
    )


def test_a_path_in_utf_8_may_have_any_letters(tmp_path: Path) -> None:
    folder = tmp_path / "modèle 模型"
    folder.mkdir()
    assert open_checkpoint(meta(folder)).format == "meta"


def test_open_rejects_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "*.pth", "*.safetensors", "holds nothing", error=AssertionError)


def test_open_lists_what_a_folder_without_weights_holds(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "params.json").write_text("{}")
    refused(tmp_path, "it holds original/, params.json", error=AssertionError)


# JSON


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"dim": 64,}', b"\xff\xfe\x00", b"[1, 2]", b"3", b"null", b"[" * 100_000, b'{"dim": ' + b"9" * 5000],
    ids=["empty", "cut", "comma", "binary", "list", "number", "null", "deep", "long"],
)
@pytest.mark.parametrize("name", ["params.json", "config.json", "model.safetensors.index.json"])
def test_open_rejects_broken_json(tmp_path: Path, name: str, content: bytes) -> None:
    {"params.json": meta, "config.json": huggingface}.get(name, indexed)(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert len(refused(tmp_path, name, "JSON")) < 1000


def test_open_rejects_a_broken_generation_config(tmp_path: Path) -> None:
    huggingface(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    refused(tmp_path, "generation_config.json", "'eos_token_id'", "'</s>'")
    (tmp_path / "generation_config.json").write_text("{")
    refused(tmp_path, "generation_config.json", "JSON")


WRONG_INTEGERS: list[Any] = [0, -1, 64.0, 1.5, "64", True, [64], {}, 2**31, 10**400]
WRONG_NUMBERS: list[Any] = [0, -1e-5, "1e-5", False, [1.0], float("nan"), float("inf"), 1e31, 10**400]


def refused_fields(path: Path, field: str, values: list[Any], expected: str) -> None:
    """Assert that each of the values is refused in an otherwise valid JSON file."""
    right = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps({**right, field: value}))
        refused(path.parent, path.name, f"'{field}'", expected)


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "head_dim", "hidden_dim"])
def test_open_rejects_wrong_integers_in_params(tmp_path: Path, field: str) -> None:
    refused_fields(meta(tmp_path) / "params.json", field, WRONG_INTEGERS, "an integer from 1 to")


@pytest.mark.parametrize("field", ["norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor"])
def test_open_rejects_wrong_numbers_in_params(tmp_path: Path, field: str) -> None:
    refused_fields(meta(tmp_path) / "params.json", field, WRONG_NUMBERS, "a positive number")


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads"])
def test_open_rejects_absent_fields_in_params(tmp_path: Path, field: str) -> None:
    refused_fields(meta(tmp_path) / "params.json", field, [None], "it is missing")


@pytest.mark.parametrize(
    ("fields", "mention"),
    [
        ({"vocab_size": -2}, "'vocab_size'"),
        ({"vocab_size": "-1"}, "'vocab_size'"),
        ({"use_scaled_rope": 1}, "'use_scaled_rope': expected true or false"),
        ({"n_layers": 10_001}, "'n_layers'"),
        ({"n_experts": 8, "dims": 1}, "unknown fields dims, n_experts"),
        ({"lora_args": {"rank": 16}}, "lora_args"),
        ({"n_kv_heads": 3}, "n_heads=8, n_kv_heads=3"),
        ({"n_heads": 7, "n_kv_heads": 7}, "64 and 7 heads"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"ffn_dim_multiplier": 1e-9}, "'ffn_dim_multiplier'"),
        ({"ffn_dim_multiplier": 1e30}, "'ffn_dim_multiplier'"),
        ({"ffn_dim_multiplier": 1.7e308}, "'ffn_dim_multiplier'"),
    ],
)
def test_open_rejects_invalid_fields_in_params(tmp_path: Path, fields: dict[str, Any], mention: str) -> None:
    refused(meta(tmp_path, **fields), "params.json", mention)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_open_rejects_wrong_integers_in_config(tmp_path: Path, field: str) -> None:
    refused_fields(huggingface(tmp_path) / "config.json", field, [*WRONG_INTEGERS, None], "an integer from 1 to")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("fields", "mention"),
    [
        ({"model_type": ...}, "got None"),
        ({"quantization_config": "gptq"}, "'quantization_config'"),
        ({"attention_bias": "no"}, "'attention_bias'"),
        ({"num_key_value_heads": 3}, "n_heads=8, n_kv_heads=3"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads'"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "64 and 7 heads"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"vocab_size": -1}, "'vocab_size'"),
        ({"rms_norm_eps": 0}, "'rms_norm_eps'"),
        ({"rope_theta": "big"}, "'rope_theta'"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings'"),
        ({"eos_token_id": [1, "2"]}, "'eos_token_id'"),
        ({"eos_token_id": -1}, "'eos_token_id'"),
        ({"rope_scaling": "llama3"}, "'rope_scaling': expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor': expected a positive number, it is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "'rope_scaling.factor'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "got ['yarn']"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'rope_parameters.partial_rotary_factor'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'rope_scaling.low_freq_factor'"),
        ({"rope_scaling": {**LLAMA3, "factor": -8}}, "'rope_scaling.factor'"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "'rope_scaling.high_freq_factor'"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0.5}}, "original_max_position_embeddings"),
    ],
)
def test_open_rejects_invalid_fields_in_config(tmp_path: Path, fields: dict[str, Any], mention: str) -> None:
    refused(huggingface(tmp_path, **fields), "config.json", mention)


# Slices


@pytest.mark.parametrize("layout", ["meta", "huggingface"])
@pytest.mark.parametrize("world_size", [3, 5, 16])
def test_tensors_rejects_a_world_that_does_not_divide(tmp_path: Path, layout: str, world_size: int) -> None:
    checkpoint = open_checkpoint((meta if layout == "meta" else huggingface)(tmp_path))
    with pytest.raises(ValueError, match=rf"world_size={world_size} .*n_heads=8 .*use one of 1, 2, 4, 8 processes"):
        checkpoint.dense_tensors(0, world_size)
    assert len(list(checkpoint.dense_tensors(0, 2))) == len(WEIGHTS)
