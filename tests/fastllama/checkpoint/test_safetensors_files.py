"""Safetensors files of a folder are chosen by config.json, by the index and by their names."""

import shutil
from pathlib import Path

import pytest
import torch

from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import SHARDS, WEIGHTS, huggingface, indexed
from tests.support.contradictions import refused


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("._model.safetensors", "hidden"),
        ("adapter_model.safetensors", "an adapter, which is not applied"),
        ("optimizer.safetensors", "a training run's state"),
        ("consolidated.safetensors", "called as in Meta's layout"),
        ("consolidated-00001-of-00002.safetensors", "called as in Meta's layout"),
        ("model (1).safetensors", "a second copy"),
        ("model.fp16.safetensors", "{}"),
        ("model-00001-of-00003.safetensors", "{}"),
        ("original.safetensors", "{}"),
    ],
)
@pytest.mark.parametrize("layout", ["one_file", "index", "set"])
def test_other_safetensors_are_passed_over(tmp_path: Path, layout: str, name: str, why: str) -> None:
    (huggingface if layout == "one_file" else indexed)(tmp_path)
    (tmp_path / name).write_bytes(b"not a checkpoint")
    general = {
        "one_file": "model.safetensors goes first",
        "index": "not in model.safetensors.index.json",
        "set": "not called model-NNNNN-of-00002",
    }
    if layout == "set":
        (tmp_path / "model.safetensors.index.json").unlink()
        if "-of-00003" in name:
            sets = "model-00001-of-00002.safetensors, model-00001-of-00003.safetensors"
            refused(
                tmp_path,
                f"{{}}: holds files of 2 checkpoints, such as {sets}; move those that are not wanted elsewhere",
            )
            return
    checkpoint = open_checkpoint(tmp_path)
    assert [(path.name, reason) for path, reason in checkpoint.passed_over] == [(name, why.format(general[layout]))]
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in checkpoint.dense_tensors())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_complete_weights_gives_a_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (huggingface(tmp_path) / name).write_bytes(b"not a checkpoint")
    assert open_checkpoint(tmp_path).passed_over == ((tmp_path / name, "an adapter, which is not applied"),)
    what = f"{name} is an adapter and is not applied: pass its folder as adapter= (--adapter) to apply it"
    assert caplog.messages == [f"{tmp_path}: {what}"]


def test_a_set_without_an_index_must_be_complete(tmp_path: Path) -> None:
    (indexed(tmp_path) / "model.safetensors.index.json").unlink()
    (tmp_path / SHARDS[1]).unlink()
    refused(tmp_path, f"{{}}: shards are missing: {SHARDS[1]}; download them")
    shutil.copy(tmp_path / SHARDS[0], tmp_path / "model-1-of-00002.safetensors")
    why = f"{SHARDS[0]} and model-1-of-00002.safetensors both have the number 1"
    refused(
        tmp_path,
        "{}: 2 files may be shards of the checkpoint, but their names do not give the order: "
        + why
        + "; move those that are not wanted elsewhere",
    )


@pytest.mark.parametrize("name", ["llama.safetensors", "model.fp16.safetensors", "model-00001-of-00001.safetensors"])
def test_one_safetensors_may_have_any_name(tmp_path: Path, name: str) -> None:
    (huggingface(tmp_path) / "model.safetensors").rename(tmp_path / name)
    assert len(dict(open_checkpoint(tmp_path).dense_tensors())) == len(WEIGHTS)


def test_the_index_is_used_if_model_safetensors_is_no_file(tmp_path: Path) -> None:
    for kind, why in (("folder", "a folder"), ("link", "not in model.safetensors.index.json")):
        folder = tmp_path / kind
        folder.mkdir()
        path = indexed(folder) / "model.safetensors"
        path.mkdir() if kind == "folder" else path.symlink_to(folder / "nowhere")
        assert open_checkpoint(folder).passed_over == ((path, why),)


def test_config_may_name_the_weights(tmp_path: Path) -> None:
    indexed(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "mine.safetensors.index.json")
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    fields = (tmp_path / "config.json").read_text()
    named = fields.replace("{", '{"transformers_weights": "mine.safetensors.index.json", ', 1)
    (tmp_path / "config.json").write_text(named)
    assert [path.name for path, _ in open_checkpoint(tmp_path).files] == list(SHARDS)
    (tmp_path / "config.json").write_text(named.replace("mine", "../mine"))
    refused(
        tmp_path,
        "{}/config.json: field 'transformers_weights': expected the name of a .safetensors file in the same folder, "
        "or of its index, got '../mine.safetensors.index.json'",
    )
