"""Writes invalid checkpoints, and checks the errors that opening them raises."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllama.checkpoint import open_checkpoint
from tests.support.checkpoints import huggingface_weights, random_weights, tiny_params, write_meta

PARAMS = tiny_params()
WEIGHTS = random_weights(PARAMS, seed=3)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": PARAMS["vocab_size"],
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("good"), PARAMS, WEIGHTS, shards=2)


@pytest.fixture(autouse=True)
def next_call_works(good: Path) -> Iterator[None]:
    """After each test, a good checkpoint must still open."""
    yield
    assert len(list(open_checkpoint(good).dense_tensors())) == len(WEIGHTS)


def refused(folder: Path, *mentions: str, error: type[Exception] = ValueError) -> str:
    """Assert that opening raises a one-line error that contains all of `mentions` -> its message."""
    with pytest.raises(error) as caught:
        open_checkpoint(folder)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    for mention in mentions:
        assert mention in message
    return message


def meta(folder: Path, shards: int = 1, **params_json: Any) -> Path:
    return write_meta(folder, PARAMS, WEIGHTS, shards=shards, **params_json)


def edit_shard(folder: Path, edit: Callable[[dict[str, Any]], Any], shard: int = 0) -> Path:
    """Rewrite a shard after `edit`, which changes the dict in place or returns another object to save."""
    path = folder / f"consolidated.{shard:02d}.pth"
    content = torch.load(path)
    replacement = edit(content)
    torch.save(content if replacement is None else replacement, path)
    return folder


def without(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        del tensors[name]

    return edit


def huggingface(folder: Path, **fields: Any) -> Path:
    """Write one safetensors file and config.json; a field given as `...` is left out."""
    config = {key: value for key, value in {**CONFIG, **fields}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(huggingface_weights(PARAMS, WEIGHTS), folder / "model.safetensors")
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def indexed(folder: Path, **changes: Any) -> Path:
    """Write two safetensors files with an index; `changes` replace entries of its weight map."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = huggingface_weights(PARAMS, WEIGHTS)
    halves = list(tensors)[::2], list(tensors)[1::2]
    for file, part in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in zip(SHARDS, halves, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**weight_map, **changes}}))
    return folder
