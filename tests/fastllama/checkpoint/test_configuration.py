"""Configuration fields that contradict each other: transformers' value is used, or an error names both."""

import re
from pathlib import Path
from typing import Any

import pytest

from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import WEIGHTS, huggingface, indexed, meta
from tests.support.checkpoints import tiny_params
from tests.support.contradictions import HF_WEIGHTS, LENGTH, LLAMA3, answers, refused, stored, transformers_answers

# Rope in config.json

ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": ...},
    {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 70.0}},
    {"rope_theta": ..., "rope_parameters": {"rope_theta": 70.0}, "rope_scaling": {"rope_type": "default"}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 70.0}, "rope_scaling": {}},
    {"rope_theta": 5e5, "rope_parameters": {**LLAMA3, **LENGTH}, "rope_scaling": {"rope_theta": 70.0}},
    {"rope_scaling": LLAMA3, "max_position_embeddings": 32},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": {**LLAMA3, **LENGTH}, "original_max_position_embeddings": 256},
    {"rope_scaling": {**LLAMA3, **LENGTH, "rope_theta": 70.0}},
    {"rope_scaling": {"factor": 8.0}},
    {"rope_scaling": {"rope_type": "default", "type": "llama3", "factor": 8.0}},
    {"rope_scaling": {**LLAMA3, **LENGTH, "type": "linear", "attention_factor": 3.0}},
]
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("fields", ROPES, ids=range(len(ROPES)))
def test_rope_is_read_as_transformers_reads_it(tmp_path: Path, fields: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    path = stored(tmp_path, HF_WEIGHTS, **fields) / "config.json"
    theirs = LlamaConfig.from_pretrained(tmp_path)
    theirs.standardize_rope_params()  # as its rotary embedding does
    rope = theirs.rope_parameters
    ours = open_checkpoint(tmp_path).params
    scaled = rope["rope_type"] == "llama3"
    assert (ours["rope_theta"], ours["use_scaled_rope"]) == (rope["rope_theta"], scaled)
    if scaled:
        assert ours["rope_original_max_seq_len"] == rope["original_max_position_embeddings"]
        assert ours["rope_scaling_factor"] == rope["factor"]
        if "type" not in fields["rope_scaling"]:
            assert answers(tmp_path) == transformers_answers(tmp_path)
    assert path.exists()


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, None),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_parameters.rope_theta=500000 is used, not rope_theta=10000, as in transformers",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "default"}},
            "rope_scaling and rope_parameters differ; rope_scaling is used, as in transformers",
        ),
        (
            {"rope_scaling": {**LLAMA3, **LENGTH}, "original_max_position_embeddings": 256},
            "original_max_position_embeddings=256 is used, not rope_scaling.original_max_position_embeddings=16, "
            "as in transformers",
        ),
        (
            {"rope_scaling": {"factor": 8.0, "beta": None}},
            "rope_scaling.factor has no effect with rope_type 'default'",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0, **LENGTH}},
            "rope_scaling.original_max_position_embeddings has no effect with rope_type 'linear'",
        ),
    ],
)
def test_unused_rope_fields_give_a_warning(
    tmp_path: Path, fields: dict[str, Any], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    open_checkpoint(huggingface(tmp_path, **fields))
    assert caplog.messages == ([f"{tmp_path}/config.json: {warning}"] if warning else [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            (
                {key: {"type": name, "factor": 2.0, "partial_rotary_factor": 0.25, "long_factor": [1.0, 2.0]}},
                f"'{key}.type': expected 'default' or 'linear' or 'llama3' or 'yarn', got '{name}'",
            )
            for key, name in (
                ("rope_scaling", "dynamic"),
                ("rope_parameters", "longrope"),
                ("rope_scaling", "proportional"),
                ("rope_scaling", "su"),
            )
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", **LENGTH}},
            "'rope_scaling.factor': expected a positive number, it is missing",
        ),
        (
            {"rope_scaling": {**YARN, "attention_factor": 0}},
            "'rope_scaling.attention_factor': expected a positive number, got 0",
        ),
        ({"rope_scaling": {**YARN, "mscale": -1}}, "'rope_scaling.mscale': expected a positive number, got -1"),
        (
            {"rope_scaling": {**YARN, "beta_fast": False}},
            "'rope_scaling.beta_fast': expected a positive number, got False",
        ),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "'rope_scaling.truncate': expected true or false, got 1"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor': expected 1 (Llama rotates whole heads), got 0.5"),
        (
            {"partial_rotary_factor": 1.0, "rope_scaling": {"partial_rotary_factor": 0.25}},
            "'rope_scaling.partial_rotary_factor': expected 1 (Llama rotates whole heads), got 0.25",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "'rope_parameters.full_attention': expected a number or a name (Llama's layers all rotate alike), "
            "got {'rope_theta': 1.0}",
        ),
    ],
)
def test_rope_other_than_llamas_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = huggingface(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{folder}/config.json: field {message}')}$"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "expected rope_theta above 1 with rope_type 'yarn', got 1"),
        (
            {"rope_parameters": {**YARN, "beta_fast": 0.5}},
            "expected rope_parameters.beta_fast of at least beta_slow, got 0.5 and 1",
        ),
    ],
)
def test_yarn_that_cannot_be_computed_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    refused(huggingface(tmp_path, **fields), f"{{}}/config.json: {message}")


# params.json


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_type": "dynamic"},
            "field 'rope_type': expected 'default' or 'linear' or 'llama3' or 'yarn' or 'factors', got 'dynamic'",
        ),
        (
            {"rope_type": "llama3"},
            "use_scaled_rope must be true for rope_type 'llama3' and false for others, got False and 'llama3'",
        ),
        ({"rope_type": "linear"}, "rope_scaling_factor must be a positive number, got None"),
        ({"rope_truncate": "no"}, "field 'rope_truncate': expected true or false, got 'no'"),
        ({"rope_beta_slow": 64.0}, "rope_beta_fast must be at least rope_beta_slow, got 32.0 and 64.0"),
    ],
)
def test_rope_types_that_params_json_cannot_have_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    refused(meta(tmp_path, use_scaled_rope=False, **fields), f"{{}}/params.json: {message}")


def test_params_json_may_state_yarn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stated: dict[str, Any] = {
        "use_scaled_rope": False,
        "rope_type": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_truncate": False,
    }
    assert stated.items() <= open_checkpoint(meta(tmp_path, **stated)).params.items()
    assert not caplog.messages


@pytest.mark.parametrize("field", ["rope_scaling_factor", "rope_original_max_seq_len", "rope_high_freq_factor"])
def test_rope_scaling_fields_without_use_scaled_rope_are_refused(tmp_path: Path, field: str) -> None:
    refused(
        meta(tmp_path, **{field: 32}),
        f"{{}}/params.json: field 'use_scaled_rope': expected true or false beside {field}, it is missing",
    )


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"use_scaled_rope": False, "rope_original_max_seq_len": 4096, "rope_scaling_factor": 1.0}, None),
        (
            {"use_scaled_rope": False, "rope_scaling_factor": 32},
            "use_scaled_rope is false, so rope_scaling_factor=32.0 has no effect",
        ),
        ({"hidden_dim": 176, "ffn_dim_multiplier": 1.0}, None),
        (
            {"hidden_dim": 176, "ffn_dim_multiplier": 1.3},
            "hidden_dim=176 is used; ffn_dim_multiplier and multiple_of would give 224",
        ),
    ],
)
def test_unused_fields_of_params_give_a_warning(
    tmp_path: Path, fields: dict[str, Any], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    params = open_checkpoint(meta(tmp_path, **fields)).params
    assert params["hidden_dim"] == 176 and not params["use_scaled_rope"]
    assert caplog.messages == ([f"{tmp_path}/params.json: {warning}"] if warning else [])


def test_params_json_may_hold_all_model_args(tmp_path: Path) -> None:
    from fastllama.args import ModelArgs

    args = vars(ModelArgs(**tiny_params()))
    assert dict(open_checkpoint(meta(tmp_path, **args)).tensors()).keys() == WEIGHTS.keys()


def test_rope_factors_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    refused(
        meta(tmp_path, use_scaled_rope=True, rope_low_freq_factor=4.0),
        "{}/params.json: rope_high_freq_factor must be above rope_low_freq_factor, got 4.0 and 4.0",
    )


# Duplicate keys


@pytest.mark.parametrize("name", ["params.json", "config.json", "generation_config.json"])
def test_a_key_with_two_values_is_refused(tmp_path: Path, name: str) -> None:
    (meta if name == "params.json" else huggingface)(tmp_path)
    path = tmp_path / name
    right = path.read_text() if path.exists() else '{"eos_token_id": 5}'
    path.write_text(right.replace("{", '{"a": {"b": 1, "b": 1}, "rope_theta": 1, "rope_theta": 2.5, ', 1))
    refused(tmp_path, f"{{}}/{name}: 'rope_theta' appears twice, as 1 and as 2.5; remove the one that is not meant")
    path.write_text(right.replace("{", '{"pad_token_id": {"b": true, "b": 1}, ', 1))
    refused(tmp_path, f"{{}}/{name}: 'b' appears twice, as True and as 1; remove the one that is not meant")
    first = right.removeprefix("{").split(",")[0].rstrip("}")
    path.write_text(right.replace("{", "{" + first + ", ", 1))
    assert open_checkpoint(tmp_path).params["dim"] == 64


def test_an_index_that_places_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    path = indexed(tmp_path) / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('{"weight_map": {', '{"weight_map": {"lm_head.weight": "b.safetensors", '))
    with pytest.raises(ValueError, match=r"index.json: 'lm_head.weight' appears twice, as 'b.safetensors' and as"):
        open_checkpoint(tmp_path)
