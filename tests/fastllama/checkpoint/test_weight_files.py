"""Which files are a checkpoint's, and in which order: by their names, and all others are passed over."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fastllama import Llama
from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import PARAMS, SHARDS, WEIGHTS, huggingface, indexed, meta
from tests.support.checkpoints import random_weights, share, tiny_params, write_meta, write_tokenizer

WIDE = tiny_params(dim=48, n_heads=12, n_kv_heads=12, hidden_dim=96)
WIDE_WEIGHTS = random_weights(WIDE, seed=5)


def renamed(folder: Path, names: Sequence[str], form: str = "consolidated.{:02d}.pth") -> Path:
    """Give part i its i-th name, as if it had been saved so."""
    for part, name in enumerate(names):
        torch.save(torch.load(folder / form.format(part)), folder / f"new {name}")
    for part in range(len(names)):
        (folder / form.format(part)).unlink()
    for name in names:
        (folder / f"new {name}").rename(folder / name)
    return folder


def assert_whole(folder: Path, params: dict[str, object] = PARAMS, weights: dict[str, torch.Tensor] = WEIGHTS) -> None:
    for rank in range(2):
        received = dict(open_checkpoint(folder).tensors(rank, 2))
        assert received.keys() == weights.keys()
        for name, tensor in received.items():
            assert torch.equal(tensor, share(params, name, weights[name], rank, 2)), name


def refused(folder: Path, message: str) -> None:
    """Opening is refused with just this message, in which {} is the folder."""
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(folder))}$"):
        open_checkpoint(folder)


# Meta's shards


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.{}.pth",  # as strings 10 comes before 2
        "consolidated.{:05d}-of-00012.pth",
        "model_{}.pth",
        "llama3-8b-part{:02d}.pth",
        "mp_rank_{:02d}_model_states.pth",
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_shards_come_in_the_order_of_their_numbers(tmp_path: Path, name: str, first: int) -> None:
    write_meta(tmp_path, WIDE, WIDE_WEIGHTS, shards=12)
    renamed(tmp_path, [name.format(part + first) for part in range(12)])
    if name == "consolidated.{}.pth" and first == 1:  # Meta counts from 0
        refused(tmp_path, "{}: shards are missing: consolidated.0.pth; download them")
    else:
        assert_whole(tmp_path, WIDE, WIDE_WEIGHTS)


@pytest.mark.parametrize("name", ["consolidated.pth", "model.pth", "llama-3-8b.pth", "7.pth", "model-1-of-1.pth"])
def test_one_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert_whole(renamed(meta(tmp_path), [name]))


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["consolidated.00.pth", "consolidated.02.pth"], "consolidated.01.pth"),
        (["consolidated.01.pth", "consolidated.02.pth"], "consolidated.00.pth"),
        (["model-00001-of-00003.pth", "model-00003-of-00003.pth"], "model-00002-of-00003.pth"),
        (["model-00000-of-00003.pth", "model-00001-of-00003.pth"], "model-00002-of-00003.pth"),
        (["part5.pth", "part3.pth"], "part1.pth, part2.pth, part4.pth"),
        (["model-1-of-2.pth"], "model-2-of-2.pth"),
        (["consolidated.1.pth"], "consolidated.0.pth"),
        (
            ["consolidated.00.pth", "consolidated.15.pth"],
            ", ".join(f"consolidated.{part:02d}.pth" for part in range(1, 9)) + " and 6 more",
        ),
    ],
)
def test_missing_shards_are_named(tmp_path: Path, names: list[str], missing: str) -> None:
    renamed(meta(tmp_path, shards=len(names)), names)
    refused(tmp_path, "{}: shards are missing: " + missing + "; download them")


REMEDY = (
    "call the shards consolidated.00.pth, consolidated.01.pth and so on, and move those that are not wanted elsewhere"
)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["a.pth", "b.pth"], "a.pth has no usable shard number"),
        (["model.pth", "model1.pth"], "model.pth has no usable shard number"),
        (["consolidated.00.pth", "consolidated.pth"], "consolidated.pth has no usable shard number"),
        (
            ["consolidated.0.pth", "consolidated.00.pth"],
            "consolidated.0.pth and consolidated.00.pth both have the number 0",
        ),
        (["consolidated.00.pth", "consolidated_1.pth"], "they differ in more than the number"),
        (["part0.pth", "shard1.pth"], "they differ in more than the number"),
        (["model-1-of-2.pth", "model-2-of-3.pth"], "they differ in more than the number"),
        (["model-1-of-2.pth", "model-3-of-2.pth"], "model-3-of-2.pth is beyond the 2 that there should be"),
        (
            ["consolidated.00.pth", f"consolidated.{'9' * 50}.pth"],
            f"consolidated.{'9' * 50}.pth has no usable shard number",
        ),
    ],
)
def test_names_that_do_not_say_the_order_are_refused(tmp_path: Path, names: list[str], why: str) -> None:
    renamed(meta(tmp_path, shards=len(names)), names)
    refused(
        tmp_path,
        "{}: 2 files may be shards of the checkpoint, but their names do not give the order: " + why + "; " + REMEDY,
    )


# What is no checkpoint's

Make = Callable[[Path], object]


def write(content: bytes = b"not a checkpoint") -> Make:
    return lambda path: path.write_bytes(content)


def link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


OTHERS: dict[str, tuple[Make, str | None]] = {
    "._consolidated.00.pth": (write(), "hidden"),
    ".consolidated.02.pth": (write(), "hidden"),
    "optimizer.pth": (write(), "a training run's state"),
    "Optimizer_0.pth": (write(), "a training run's state"),
    "scheduler.pth": (write(), "a training run's state"),
    "rng_state_0.pth": (write(), "a training run's state"),
    "training_args.pth": (write(), "a training run's state"),
    "recipe_state.pth": (write(), "a training run's state"),
    "consolidated.00.optim.pth": (write(), "a training run's state"),
    "adapter_model.pth": (write(), "an adapter, which is not applied"),
    "consolidated.00 (1).pth": (write(), "a second copy"),
    "consolidated.01 - Copy.pth": (write(), "a second copy"),
    "consolidated.00.old.pth": (write(), "not called consolidated.NN.pth"),
    "vision_tower.pth": (write(), "not called consolidated.NN.pth"),
    "gone.pth": (link, "a broken link"),
    "consolidated.07.pth": (Path.mkdir, "a folder"),
    "consolidated.00.pth.tmp": (write(), None),  # no one's suffix: not even mentioned
    "optimizer.bin": (write(), None),
}


def test_what_is_not_called_a_shard_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastllama")
    meta(tmp_path, shards=2)
    for name, (make, _) in OTHERS.items():
        make(tmp_path / name)
    assert_whole(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert [path.name for path, _ in checkpoint.files] == ["consolidated.00.pth", "consolidated.01.pth"]
    reasons = {name: why for name, (_, why) in OTHERS.items() if why}
    assert {path.name: why for path, why in checkpoint.passed_over} == reasons
    assert f"checkpoint: {tmp_path}, consolidated.00.pth, consolidated.01.pth; passed over: " in caplog.text
    assert all(f"{name} ({why})" in caplog.text for name, why in reasons.items())


def test_nothing_is_mentioned_where_nothing_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastllama")
    assert open_checkpoint(meta(tmp_path)).passed_over == ()
    assert caplog.messages == [f"checkpoint: {tmp_path}, consolidated.00.pth"]


@pytest.mark.parametrize(
    "name", ["optimizer.pth", "rng_state.pth", "lr_scheduler.pth", "recipe_state.pth", "adapter_model.pth"]
)
def test_other_names_are_told_from_checkpoints_of_any_name(tmp_path: Path, name: str) -> None:
    renamed(meta(tmp_path), ["llama3-optimized.pth"])
    write()(tmp_path / name)
    assert_whole(tmp_path)


@pytest.mark.parametrize("name", [".model.pth", "optimizer.pth"])
def test_a_folder_of_other_files_alone_is_none(tmp_path: Path, name: str) -> None:
    renamed(meta(tmp_path), [name])
    with pytest.raises(AssertionError, match=rf"^no checkpoint in .*it holds {re.escape(name)}, params.json$"):
        open_checkpoint(tmp_path)


def test_a_shard_that_links_to_nothing_is_missed(tmp_path: Path) -> None:
    path = meta(tmp_path, shards=2) / "consolidated.01.pth"
    path.unlink()
    link(path)
    refused(tmp_path, "{}/consolidated.01.pth: cannot be read (No such file or directory)")


def test_what_was_passed_over_is_told_where_shards_are_too_few(tmp_path: Path) -> None:
    path = meta(tmp_path, shards=2) / "consolidated.01.pth"
    path.rename(tmp_path / "consolidated.01 (1).pth")
    refused(
        tmp_path,
        "{}: tok_embeddings.weight: expected (576, 64) from 1 shards, got shards of (288, 64); compare params.json and "
        "the number of files (consolidated.01 (1).pth passed over)",
    )


def test_answers_do_not_depend_on_what_files_are_called(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("plain", "numbered", "counted", "set", "alone")]
    for folder in folders:
        folder.mkdir()
    plain, numbered, counted, whole_set, alone = folders
    meta(plain)
    renamed(meta(numbered, shards=4), [f"part{part}.pth" for part in range(1, 5)])
    renamed(meta(counted, shards=2), ["model-00001-of-00002.pth", "model-00002-of-00002.pth"])
    (indexed(whole_set) / "model.safetensors.index.json").unlink()
    (huggingface(alone) / "model.safetensors").rename(alone / "llama.safetensors")
    tokenizer = str(write_tokenizer(tmp_path))
    answers = []
    for folder in folders:
        llm = Llama.build(str(folder), tokenizer, 48, 2, device="cpu")
        answers.append(llm.generate([[5, 250, 17], [9]], 24, temperature=0)[0])
    assert all(answer == answers[0] for answer in answers)


# Hugging Face's files


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
def test_what_is_not_called_hugging_faces_is_passed_over(tmp_path: Path, layout: str, name: str, why: str) -> None:
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
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in checkpoint.tensors())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_whole_weights_is_warned_of(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write()(huggingface(tmp_path) / name)
    assert open_checkpoint(tmp_path).passed_over == ((tmp_path / name, "an adapter, which is not applied"),)
    assert caplog.messages == [f"{tmp_path}: {name} is an adapter and is not applied: merge it first"]


def test_a_set_without_an_index_must_be_whole(tmp_path: Path) -> None:
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
    assert len(dict(open_checkpoint(tmp_path).tensors())) == len(WEIGHTS)


def test_a_model_file_that_is_none_leaves_the_index(tmp_path: Path) -> None:
    for make, why in ((Path.mkdir, "a folder"), (link, "not in model.safetensors.index.json")):
        folder = tmp_path / why
        folder.mkdir()
        make(indexed(folder) / "model.safetensors")
        assert open_checkpoint(folder).passed_over == ((folder / "model.safetensors", why),)


def test_config_may_name_the_weights(tmp_path: Path) -> None:
    indexed(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "mine.safetensors.index.json")
    write()(tmp_path / "model.safetensors")
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
