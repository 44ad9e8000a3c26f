"""Shards are chosen and sorted by the names of `*.pth` files; all other files are passed over."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fastllama import Llama
from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import PARAMS, WEIGHTS, huggingface, indexed, meta
from tests.support.checkpoints import random_weights, share, tiny_params, write_meta, write_tokenizer
from tests.support.contradictions import refused

WIDE = tiny_params(dim=48, n_heads=12, n_kv_heads=12, hidden_dim=96)
WIDE_WEIGHTS = random_weights(WIDE, seed=5)


def renamed(folder: Path, names: Sequence[str], form: str = "consolidated.{:02d}.pth") -> Path:
    """Save shard i again under its i-th name."""
    for shard, name in enumerate(names):
        torch.save(torch.load(folder / form.format(shard)), folder / f"new {name}")
    for shard in range(len(names)):
        (folder / form.format(shard)).unlink()
    for name in names:
        (folder / f"new {name}").rename(folder / name)
    return folder


def assert_loads(folder: Path, params: dict[str, object] = PARAMS, weights: dict[str, torch.Tensor] = WEIGHTS) -> None:
    for rank in range(2):
        received = dict(open_checkpoint(folder).dense_tensors(rank, 2))
        assert received.keys() == weights.keys()
        for name, tensor in received.items():
            assert torch.equal(tensor, share(params, name, weights[name], rank, 2)), name


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
def test_shards_are_sorted_by_their_numbers(tmp_path: Path, name: str, first: int) -> None:
    write_meta(tmp_path, WIDE, WIDE_WEIGHTS, shards=12)
    renamed(tmp_path, [name.format(shard + first) for shard in range(12)])
    if name == "consolidated.{}.pth" and first == 1:  # Meta counts from 0
        refused(tmp_path, "{}: shards are missing: consolidated.0.pth; download them")
    else:
        assert_loads(tmp_path, WIDE, WIDE_WEIGHTS)


@pytest.mark.parametrize("name", ["consolidated.pth", "model.pth", "llama-3-8b.pth", "7.pth", "model-1-of-1.pth"])
def test_one_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert_loads(renamed(meta(tmp_path), [name]))


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
def test_missing_shards_are_listed(tmp_path: Path, names: list[str], missing: str) -> None:
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
def test_names_that_do_not_give_the_order_are_refused(tmp_path: Path, names: list[str], why: str) -> None:
    renamed(meta(tmp_path, shards=len(names)), names)
    refused(
        tmp_path,
        "{}: 2 files may be shards of the checkpoint, but their names do not give the order: " + why + "; " + REMEDY,
    )


# Other files

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
    "consolidated.00.pth.tmp": (write(), None),  # another suffix: not mentioned
    "optimizer.bin": (write(), None),
}


def test_files_not_named_as_shards_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastllama")
    meta(tmp_path, shards=2)
    for name, (make, _) in OTHERS.items():
        make(tmp_path / name)
    assert_loads(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert [path.name for path, _ in checkpoint.files] == ["consolidated.00.pth", "consolidated.01.pth"]
    reasons = {name: why for name, (_, why) in OTHERS.items() if why}
    assert {path.name: why for path, why in checkpoint.passed_over} == reasons
    assert f"checkpoint: {tmp_path}, consolidated.00.pth, consolidated.01.pth; passed over: " in caplog.text
    assert all(f"{name} ({why})" in caplog.text for name, why in reasons.items())


def test_a_folder_without_other_files_logs_only_the_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastllama")
    assert open_checkpoint(meta(tmp_path)).passed_over == ()
    assert caplog.messages == [f"checkpoint: {tmp_path}, consolidated.00.pth"]


@pytest.mark.parametrize(
    "name", ["optimizer.pth", "rng_state.pth", "lr_scheduler.pth", "recipe_state.pth", "adapter_model.pth"]
)
def test_a_checkpoint_of_any_name_is_distinguished_from_other_files(tmp_path: Path, name: str) -> None:
    renamed(meta(tmp_path), ["llama3-optimized.pth"])
    write()(tmp_path / name)
    assert_loads(tmp_path)


@pytest.mark.parametrize("name", [".model.pth", "optimizer.pth"])
def test_a_folder_with_only_other_files_has_no_checkpoint(tmp_path: Path, name: str) -> None:
    renamed(meta(tmp_path), [name])
    with pytest.raises(AssertionError, match=rf"^no checkpoint in .*it holds {re.escape(name)}, params.json$"):
        open_checkpoint(tmp_path)


def test_a_shard_that_is_a_broken_link_is_an_error(tmp_path: Path) -> None:
    path = meta(tmp_path, shards=2) / "consolidated.01.pth"
    path.unlink()
    link(path)
    refused(tmp_path, "{}/consolidated.01.pth: cannot be read (No such file or directory)")


def test_passed_over_files_are_listed_if_shards_are_missing(tmp_path: Path) -> None:
    path = meta(tmp_path, shards=2) / "consolidated.01.pth"
    path.rename(tmp_path / "consolidated.01 (1).pth")
    refused(
        tmp_path,
        "{}: tok_embeddings.weight: expected (576, 64) from 1 shards, got shards of (288, 64); compare params.json and "
        "the number of files (consolidated.01 (1).pth passed over)",
    )


def test_answers_do_not_depend_on_file_names(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("plain", "numbered", "counted", "set", "alone")]
    for folder in folders:
        folder.mkdir()
    plain, numbered, counted, indexed_set, alone = folders
    meta(plain)
    renamed(meta(numbered, shards=4), [f"part{part}.pth" for part in range(1, 5)])
    renamed(meta(counted, shards=2), ["model-00001-of-00002.pth", "model-00002-of-00002.pth"])
    (indexed(indexed_set) / "model.safetensors.index.json").unlink()
    (huggingface(alone) / "model.safetensors").rename(alone / "llama.safetensors")
    tokenizer = str(write_tokenizer(tmp_path))
    answers = []
    for folder in folders:
        llm = Llama.build(str(folder), tokenizer, 48, 2, device="cpu")
        answers.append(llm.generate([[5, 250, 17], [9]], 24, temperature=0)[0])
    assert all(answer == answers[0] for answer in answers)
