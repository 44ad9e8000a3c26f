"""Adapters that cannot be merged are ValueErrors that name the file, what was expected and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastllama.checkpoint import open_checkpoint
from tests.support.adapters import factor_tensors, random_factors, write_adapter
from tests.support.checkpoints import random_weights, tiny_params, write_meta

PARAMS = tiny_params()
WEIGHTS = random_weights(PARAMS, seed=11)
FACTORS = random_factors(PARAMS, WEIGHTS, ["q_proj", "v_proj"], seed=0)
TENSORS = factor_tensors(FACTORS)
LAYER = "base_model.model.model.layers.0"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MERGE = "merge it into its base model with PEFT's merge_and_unload() and then save_pretrained(), and pass the folder"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("base"), PARAMS, WEIGHTS)


def refused(base: Path, adapter: Path, *parts: str) -> None:
    """Assert a ValueError in one line that contains all of `parts`."""
    with pytest.raises(ValueError) as caught:
        open_checkpoint(base, [adapter])
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"peft_type": ...}, ["'peft_type'", "it is missing"]),
        ({"bias": "lora_only"}, ["'bias' is 'lora_only'", MERGE]),
        ({"init_lora_weights": {"a": 1}}, ["'init_lora_weights' is {'a': 1}"]),
        ({"r": ...}, ["'r'", "it is missing"]),
        ({"r": 0}, ["'r'", "an integer from 1", "got 0"]),
        ({"r": 2.5}, ["'r'", "got 2.5"]),
        ({"lora_alpha": "16"}, ["'lora_alpha'", "a positive number", "got '16'"]),
        ({"use_rslora": "yes"}, ["'use_rslora'", "true or false"]),
        ({"rank_pattern": ["q_proj"]}, ["'rank_pattern'", "an object"]),
        ({"rank_pattern": {"q_proj": "x"}}, ["'rank_pattern.q_proj'", "an integer"]),
        ({"alpha_pattern": {"q_proj": -1}}, ["'alpha_pattern.q_proj'", "a positive number"]),
        ({"alpha_pattern": {"(q_proj": 1}}, ["alpha_pattern", "expected a regular expression"]),
        ({"target_modules": "(q_proj"}, ["'target_modules'", "expected a regular expression"]),
        ({"target_modules": [1]}, ["'target_modules'", "a regular expression or a list of names", "got [1]"]),
        ({"exclude_modules": 3}, ["'exclude_modules'", "a list of names", "got 3"]),
        ({"layers_to_transform": [0, 2]}, ["'layers_to_transform'", "layers from 0 to 1", "got [0, 2]"]),
        ({"layers_to_transform": "all"}, ["'layers_to_transform'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_that_cannot_be_merged(base: Path, tmp_path: Path, fields: dict[str, Any], parts: list[str]) -> None:
    refused(base, write_adapter(tmp_path, TENSORS, **fields), str(tmp_path / CONFIG), *parts)


@pytest.mark.parametrize(
    ("targets", "missing"),
    [
        (["q_proj", "v_proj", "o_proj"], "1 modules in target_modules: o_proj;"),
        (["q_proj", "v_proj", "c_attn", "lm_head"], "2 modules in target_modules: c_attn, lm_head;"),
        (r".*\.(q|k)_proj", r"k_proj, model.layers.1.self_attn.k_proj"),
        ("all-linear", "model.layers.0.mlp.down_proj"),
    ],
)
def test_targets_without_tensors_are_listed(base: Path, tmp_path: Path, targets: Any, missing: str) -> None:
    refused(base, write_adapter(tmp_path, TENSORS, target_modules=targets), str(tmp_path / FILE), missing)


def test_a_layer_without_tensors_is_listed(base: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if "layers.1.self_attn.q_proj" not in name}
    adapter = write_adapter(tmp_path, tensors, target_modules=["q_proj", "v_proj"])
    refused(base, adapter, "1 modules in target_modules: model.layers.1.self_attn.q_proj;", "download it again")


Tensors = dict[str, Tensor]
MATRIX = torch.zeros(4, 64)


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        ({f"{LAYER}.self_attn.q_proj.lora_magnitude_vector.default.weight": MATRIX}, ["DoRA"]),
        ({"base_model.model.lm_head.weight": MATRIX}, ["a complete lm_head that is not that of", MERGE]),
        (
            {"base_model.model.model.embed_tokens.base_layer.weight": WEIGHTS["tok_embeddings.weight"] + 1},
            ["a complete embed_tokens that is not that of", MERGE],
        ),
        ({f"{LAYER}.input_layernorm.lora_A.weight": MATRIX}, ["1 tensors are not LoRA factors", "input_layernorm"]),
        (
            {"base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": MATRIX, "other": MATRIX.clone()},
            ["2 tensors are not LoRA factors of a module of the base", "layers.2.mlp.up_proj.lora_A.weight", "other"],
        ),
        ({"base_model.model.model.embed_tokens.lora_A.weight": MATRIX}, ["not LoRA factors", "embed_tokens.lora_A"]),
        ({"base_model.model.lm_head.lora_embedding_A": MATRIX}, ["not LoRA factors", "lm_head.lora_embedding_A"]),
        ({f"{LAYER}.mlp.up_proj.lora_A.weight": MATRIX}, ["expected A and B", "layers.0.mlp.up_proj has only A"]),
        (
            {f"{LAYER}.self_attn.q_proj.lora_A.default.weight": MATRIX},
            [f"{LAYER}.self_attn.q_proj.lora_A.default.weight", "are names of the same tensor"],
        ),
        ({f"{LAYER}.self_attn.q_proj.lora_A.weight": MATRIX.int()}, ["expected bfloat16", "lora_A.weight (I32)"]),
        (
            {f"{LAYER}.self_attn.q_proj.lora_A.weight": torch.zeros(4, 128)},
            ["A of model.layers.0.self_attn.q_proj: expected (4, 64), got (4, 128)", "trained on 'some/base'"],
        ),
        (
            {f"{LAYER}.self_attn.v_proj.lora_B.weight": torch.zeros(32, 4)},
            ["B of model.layers.0.self_attn.v_proj: expected (16, 4), got (32, 4)"],
        ),
        ({f"{LAYER}.self_attn.v_proj.lora_B.weight": torch.zeros(16)}, ["expected (16, 4), got (16,)"]),
        ({f"{LAYER}.self_attn.v_proj.lora_B.weight": torch.zeros(16, 0)}, ["expected (16, 4), got (16, 0)"]),
    ],
)
def test_tensors_that_cannot_be_merged(base: Path, tmp_path: Path, edit: Tensors, parts: list[str]) -> None:
    refused(base, write_adapter(tmp_path, {**TENSORS, **edit}), str(tmp_path / FILE), *parts)


def test_ranks_must_be_those_of_the_configuration(base: Path, tmp_path: Path) -> None:
    refused(base, write_adapter(tmp_path, TENSORS, r=8), "8 tensors", "expected (8, 64), got (4, 64)")
    adapter = write_adapter(tmp_path, TENSORS, rank_pattern={"v_proj": 2}, base_model_name_or_path=None)
    refused(base, adapter, "4 tensors", "expected (2, 64), got (4, 64)", "trained on one that it does not name")


def test_a_tied_outputs_copy_is_compared_with_the_embedding(tmp_path: Path) -> None:
    tied = tiny_params(tied_output=True)
    weights = random_weights(tied, seed=4)
    base = write_meta(tmp_path / "base", tied, weights, tied_output=True)
    name = "base_model.model.lm_head.base_layer.weight"
    good = write_adapter(tmp_path / "good", {**TENSORS, name: weights["tok_embeddings.weight"]})
    assert open_checkpoint(base, [good]).params["tied_output"]
    refused(base, write_adapter(tmp_path / "bad", {**TENSORS, name: WEIGHTS["output.weight"]}), "a complete lm_head")


def truncated(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])


def damage(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda folder: (folder / FILE).unlink(), [f"expected a LoRA adapter as PEFT saves it; it lacks {FILE}"]),
        (lambda folder: (folder / CONFIG).unlink(), [f"it lacks {CONFIG}"]),
        (truncated, [FILE, "is truncated or damaged", "download it again"]),
        (damage(FILE, b""), [FILE, "is empty"]),
        (damage(FILE, b"\xff" * 64), [FILE, "is truncated or damaged"]),
        (damage(FILE, b"version https://git-lfs.github.com/spec/v1\n"), [FILE, "is a git-lfs pointer"]),
        (lambda folder: save_file({}, folder / FILE), [FILE, "holds no tensors"]),
        (damage(CONFIG, b"{"), [CONFIG, "is not valid JSON"]),
        (damage(CONFIG, b"\xff\xfe{}"), [CONFIG, "is not valid JSON"]),
        (damage(CONFIG, b"[1]"), [CONFIG, "expected a JSON object"]),
        (damage(CONFIG, b'{"r": 1, "r": 2}'), [CONFIG, "appears twice"]),
    ],
)
def test_damaged_and_missing_files(
    base: Path, tmp_path: Path, change: Callable[[Path], object], parts: list[str]
) -> None:
    change(write_adapter(tmp_path, TENSORS))
    refused(base, tmp_path, str(tmp_path), *parts)


def test_what_is_not_a_folder(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path, TENSORS)
    refused(base, tmp_path / "nowhere", f"adapter folder '{tmp_path}/nowhere' does not exist")
    refused(base, tmp_path / FILE, f"adapter folder '{tmp_path / FILE}' is not a folder")


def test_fields_that_change_nothing_are_accepted(base: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        **{"use_dora": False, "modules_to_save": None, "loftq_config": {}, "megatron_core": "megatron.core"},
        **{"init_lora_weights": True, "rank_pattern": {}, "new_kind_of_lora": None, "qalora_group_size": 16},
    }
    assert json.loads((write_adapter(tmp_path, TENSORS, **fields) / CONFIG).read_text())["qalora_group_size"] == 16
    assert open_checkpoint(base, [tmp_path]).adapters == (tmp_path,)
