"""Copies in shards must agree, slices must differ, and file names must not contradict recorded names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.checkpoint import consistency, open_checkpoint
from tests.support.bad_checkpoints import PARAMS, WEIGHTS, edit_shard, meta
from tests.support.checkpoints import random_weights, share, write_meta
from tests.support.contradictions import refused

OTHER = random_weights(PARAMS, seed=4)
DIFFERENT = (
    "but its values differ; the files are of different checkpoints or in the wrong order: download all files of one "
    "checkpoint"
)


def nudge(name: str, *place: int) -> Any:
    def edit(shard: dict[str, Any]) -> None:
        shard[name][place] += 0.1

    return edit


def reverse(name: str) -> Any:
    """Another tensor with the same mean and standard deviation, as that of another layer or model may be."""

    def edit(shard: dict[str, Any]) -> None:
        shard[name] = shard[name].flip(0).clone()

    return edit


def scale(factor: float) -> Any:
    def edit(shard: dict[str, Any]) -> None:
        shard["norm.weight"] *= factor

    return edit


def drift_warning(path: Path, *names: str) -> str:
    return (
        f"{path}: {', '.join(names)} differ from those in the other shards, as is known of Llama 3 70B; this "
        "file's are used. If the shards may be of two fine-tuned models, download all of one"
    )


def spread(amount: float) -> Any:
    """Norms of another fine-tune of the same base: noise of `amount` times their standard deviation, 0.1."""

    def edit(shard: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(9)
        for name, tensor in shard.items():
            if "norm" in name:
                tensor += 0.1 * amount * torch.randn(64, generator=generator)

    return edit


@pytest.mark.parametrize("part", [1, 3])
@pytest.mark.parametrize("name", ["layers.0.attention_norm.weight", "layers.1.ffn_norm.weight", "norm.weight"])
def test_norms_are_the_same_in_all_shards(tmp_path: Path, name: str, part: int) -> None:
    edit_shard(meta(tmp_path, shards=4), reverse(name), shard=part)
    refused(tmp_path, f"{{}}/consolidated.0{part}.pth: expected the same {name} as in consolidated.00.pth, {DIFFERENT}")


def drift(shard: dict[str, Any]) -> None:
    """Norms that differ by two units in the last place of bfloat16, as copies in Meta's Llama 3 70B do."""
    for name, tensor in shard.items():
        if "norm" in name:
            shard[name] = (tensor.view(torch.int16) + 2).view(torch.bfloat16)


def test_norms_may_differ_slightly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_meta(tmp_path, PARAMS, WEIGHTS, shards=2, dtype=torch.bfloat16)
    edit_shard(tmp_path, drift, shard=1)
    received = dict(open_checkpoint(tmp_path).dense_tensors())
    assert all(torch.equal(tensor, WEIGHTS[name].bfloat16()) for name, tensor in received.items())
    norms = [f"layers.{layer}.{part}_norm.weight" for layer in range(2) for part in ("attention", "ffn")]
    assert caplog.messages == [drift_warning(tmp_path / "consolidated.00.pth", *norms, "norm.weight")]


@pytest.mark.parametrize(
    "edit",
    [spread(0.3), spread(1.0), nudge("norm.weight", 63), scale(2)],
    ids=["all", "all-far", "one", "twice"],
)
def test_norms_that_are_close_give_a_warning(tmp_path: Path, edit: Any, caplog: pytest.LogCaptureFixture) -> None:
    edit_shard(meta(tmp_path, shards=2), edit, shard=1)
    received = dict(open_checkpoint(tmp_path).dense_tensors())
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in received.items())
    (message,) = caplog.messages
    assert "norm.weight differ from those in the other shards" in message


@pytest.mark.parametrize("edit", [spread(3.0), scale(torch.nan)], ids=["moved", "nan"])
def test_norms_that_are_not_close_are_refused(tmp_path: Path, edit: Any) -> None:
    edit_shard(meta(tmp_path, shards=2), edit, shard=1)
    with pytest.raises(ValueError, match=rf"consolidated.01.pth: expected the same .*norm.weight as .*, {DIFFERENT}$"):
        open_checkpoint(tmp_path)


def test_shards_of_two_checkpoints_are_refused(tmp_path: Path) -> None:
    ours, theirs = meta(tmp_path / "ours", shards=2), write_meta(tmp_path / "theirs", PARAMS, OTHER, shards=2)
    (theirs / "consolidated.01.pth").rename(ours / "consolidated.01.pth")
    name = "layers.0.attention_norm.weight"
    with pytest.raises(ValueError, match=rf"consolidated.01.pth: expected the same {name} as in consolidated.00.pth"):
        open_checkpoint(ours)


def test_norms_may_hold_the_same_nan(tmp_path: Path) -> None:
    weights = {**WEIGHTS, "norm.weight": torch.full((64,), torch.nan)}
    assert open_checkpoint(write_meta(tmp_path, PARAMS, weights, shards=2)).params["dim"] == 64


@pytest.mark.parametrize("name", ["layers.0.attention.wk.weight", "layers.1.attention.wv.weight"])
@pytest.mark.parametrize(("part", "first"), [(1, 0), (3, 0), (6, 4)])
def test_kv_heads_are_the_same_in_the_shards_that_share_them(tmp_path: Path, name: str, part: int, first: int) -> None:
    edit_shard(meta(tmp_path, shards=8), reverse(name), shard=part)
    files = f"{{}}/consolidated.0{part}.pth: expected the same {name} as in consolidated.0{first}.pth"
    refused(tmp_path, f"{files}, {DIFFERENT}")


@pytest.mark.parametrize("row", [0, 1, 2, 4, 7])  # eight rows of 256 bytes; the beginnings of 0, 2, 4 and 7 are sampled
@pytest.mark.parametrize("column", [0, -1])
def test_kv_heads_that_differ_slightly_give_a_warning(
    tmp_path: Path, row: int, column: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(consistency, "SAMPLE_BYTES", 128)
    name = "layers.1.attention.wv.weight"
    edit_shard(meta(tmp_path, shards=8), nudge(name, row, column), shard=6)
    checkpoint = open_checkpoint(tmp_path)
    sampled = row != 1 and column == 0
    assert caplog.messages == [drift_warning(tmp_path / "consolidated.00.pth", name)] * sampled
    for _ in range(2):
        received = dict(checkpoint.dense_tensors())
        assert torch.equal(received[name], WEIGHTS[name])
    late = f"{tmp_path}/consolidated.06.pth: its {name} differs from that in consolidated.04.pth, which is used"
    assert caplog.messages == [drift_warning(tmp_path / "consolidated.00.pth", name) if sampled else late]


@pytest.mark.parametrize("shards", [2, 4])
def test_a_shard_and_its_copy_are_refused(tmp_path: Path, shards: int) -> None:
    meta(tmp_path, shards=shards)
    torch.save(torch.load(tmp_path / "consolidated.00.pth"), tmp_path / f"consolidated.0{shards - 1}.pth")
    refused(
        tmp_path,
        f"{{}}/consolidated.0{shards - 1}.pth: holds the same slice of layers.0.attention.wq.weight as "
        "consolidated.00.pth; one is a copy of the other: download the shard that is missing",
    )


def test_constant_shards_are_not_copies(tmp_path: Path) -> None:
    weights = {name: torch.ones_like(weight) for name, weight in WEIGHTS.items()}
    assert open_checkpoint(write_meta(tmp_path, PARAMS, weights, shards=2)).params["dim"] == 64


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "kept")
    (folder / other).rename(folder / one)
    (folder / "kept").rename(folder / other)


def test_swapped_files_are_refused(tmp_path: Path) -> None:
    swap(meta(tmp_path, shards=2), "consolidated.00.pth", "consolidated.01.pth")
    refused(
        tmp_path,
        "{}/consolidated.00.pth: was saved as consolidated.01.pth, so the files' names contradict the order in which "
        "they were written; restore the original file names, or, if the present names are right, save each again: "
        "torch.save(torch.load(path), path)",
    )
    for path in sorted(tmp_path.glob("*.pth")):  # as the message says
        torch.save(torch.load(path), path)
    assert open_checkpoint(tmp_path).params["dim"] == 64


def test_shared_kv_heads_reveal_a_wrong_order(tmp_path: Path) -> None:
    swap(meta(tmp_path, shards=8), "consolidated.03.pth", "consolidated.05.pth")
    for path in sorted(tmp_path.glob("*.pth")):
        torch.save(torch.load(path), path)
    name = "layers.0.attention.wk.weight"
    refused(tmp_path, f"{{}}/consolidated.03.pth: expected the same {name} as in consolidated.00.pth, {DIFFERENT}")


@pytest.mark.parametrize(
    "saved_as",
    [
        ("consolidated.00.pth",) * 2,
        ("rank.pth",) * 2,
        ("a buffer",) * 2,
        ("tmp-step93.pth", "tmp-step12.pth"),
        ("part3.pth", "part1.pth"),
        (f"pid-{'9' * 40}.pth", "pid-1.pth"),
    ],
    ids=" ".join,
)
def test_recorded_names_without_shard_numbers_give_no_order(tmp_path: Path, saved_as: tuple[str, str]) -> None:
    meta(tmp_path, shards=2)
    for part, name in enumerate(saved_as):
        content = {name: share(PARAMS, name, weight, part, 2).clone() for name, weight in WEIGHTS.items()}
        place = tmp_path / str(part) / name
        place.parent.mkdir()
        if name == "a buffer":
            with place.open("wb") as file:
                torch.save(content, file)
        else:
            torch.save(content, place)
        place.rename(tmp_path / f"consolidated.0{part}.pth")
    received = dict(open_checkpoint(tmp_path).dense_tensors())
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in received.items())


@pytest.mark.parametrize("first", [0, 1])
def test_recorded_names_with_shard_numbers_give_the_order(tmp_path: Path, first: int) -> None:
    meta(tmp_path, shards=2)
    for part in range(2):
        content = torch.load(tmp_path / f"consolidated.0{part}.pth")
        place = tmp_path / f"rank{first + 1 - part}.pth"
        torch.save(content, place)
        place.rename(tmp_path / f"consolidated.0{part}.pth")
    with pytest.raises(ValueError, match=rf"consolidated.00.pth: was saved as rank{first + 1}.pth, so the files'"):
        open_checkpoint(tmp_path)
