"""The choice of a checkpoint in a folder, the log of it, and errors for folders without a checkpoint."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama
from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import CONFIG, PARAMS, WEIGHTS, huggingface, meta
from tests.support.checkpoints import random_weights, write_meta, write_tokenizer
from tests.support.refusals.files import OTHER_FORMATS

BASE = random_weights(PARAMS, seed=8)


def base(folder: Path, *places: str) -> None:
    """The base model's files in subfolders, with a tokenizer."""
    for place in places:
        write_meta(folder / place, PARAMS, BASE)
        write_tokenizer(folder / place)


def norm(folder: Path) -> torch.Tensor:
    return dict(open_checkpoint(folder).dense_tensors())["norm.weight"]


# Priority


@pytest.mark.parametrize("places", [("original",), ("original/mp8",), ("original", "original/mp16")])
def test_a_folders_own_safetensors_go_before_the_base_model(
    tmp_path: Path, places: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fastllama")
    base(tmp_path, *places)
    assert torch.equal(norm(tmp_path), BASE["norm.weight"])
    huggingface(tmp_path)
    caplog.clear()
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.path) == ("huggingface", tmp_path)
    assert torch.equal(norm(tmp_path), WEIGHTS["norm.weight"])
    reason = "the folder's own weights go first"
    assert checkpoint.passed_over == tuple((tmp_path / place, reason) for place in places)
    others = ", ".join(f"{place} ({reason})" for place in places)
    assert caplog.messages[0] == f"checkpoint: {tmp_path}, model.safetensors; passed over: {others}"


def test_a_fine_tuned_model_generates_its_own_tokens(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    huggingface(tmp_path / "alone")
    huggingface(tmp_path)
    base(tmp_path, "original")
    answers = []
    for folder in (tmp_path, tmp_path / "alone", tmp_path / "original"):
        llm = Llama.build(str(folder), str(tmp_path), 64, 1, device="cpu")
        answers.append(llm.generate([[5, 250, 17]], 20, temperature=0)[0])
    assert answers[0] == answers[1] != answers[2]


def test_own_meta_files_go_before_own_safetensors(tmp_path: Path) -> None:
    write_meta(huggingface(tmp_path), PARAMS, BASE)
    base(tmp_path, "original")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.path) == ("meta", tmp_path)
    assert checkpoint.passed_over == (
        (tmp_path / "model.safetensors", "Meta's layout goes first"),
        (tmp_path / "original", "the folder's own weights go first"),
    )


def test_safetensors_are_used_if_shards_have_no_params(tmp_path: Path) -> None:
    (meta(huggingface(tmp_path)) / "params.json").unlink()
    base(tmp_path, "original")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "huggingface"
    assert checkpoint.passed_over == (
        (tmp_path / "consolidated.00.pth", "no params.json beside it"),
        (tmp_path / "original", "the folder's own weights go first"),
    )


@pytest.mark.parametrize("own", ["safetensors", "pth"])
def test_own_weights_without_their_json_are_not_replaced(tmp_path: Path, own: str) -> None:
    base(tmp_path, "original")
    name = "config.json" if own == "safetensors" else "params.json"
    ((huggingface if own == "safetensors" else meta)(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: does not exist; download it"):
        open_checkpoint(tmp_path)


def test_subfolders_are_searched_in_order(tmp_path: Path) -> None:
    base(tmp_path, "original/mp8", "original/mp16", "original")
    (tmp_path / "optimizer.pth").write_bytes(b"")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path / "original"
    assert checkpoint.passed_over == (
        (tmp_path / "optimizer.pth", "a training run's state"),
        (tmp_path / "original/mp8", "original goes first"),
        (tmp_path / "original/mp16", "original goes first"),
    )
    (tmp_path / "original/params.json").unlink()
    assert open_checkpoint(tmp_path).path == tmp_path / "original/mp8"


# Folders without a checkpoint

APPLY = "as the checkpoint, and this one as adapter= (on the command line --adapter)"


def adapter(folder: Path, config: str | None, weights: str = "adapter_model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / weights).write_bytes(b"weights")
    if config is not None:
        (folder / "adapter_config.json").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"peft_type": "LORA"}, f"a LoRA adapter, not a complete model: pass the folder of its base model {APPLY}"),
        (
            {"base_model_name_or_path": None},
            f"an adapter (LoRA or similar), not a complete model: pass the folder of its base model {APPLY}",
        ),
        (None, f"an adapter (LoRA or similar), not a complete model: pass the folder of its base model {APPLY}"),
        ("{", f"an adapter (LoRA or similar), not a complete model: pass the folder of its base model {APPLY}"),
    ],
)
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_named_in_the_error(tmp_path: Path, config: Any, what: str, weights: str) -> None:
    adapter(tmp_path, json.dumps(config) if isinstance(config, dict) else config, weights)
    message = f"no checkpoint in {str(tmp_path)!r}: it holds {what}"
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}$"):
        open_checkpoint(tmp_path)


def test_an_adapter_is_not_replaced_by_the_base_model(tmp_path: Path) -> None:
    base(adapter(tmp_path, '{"peft_type": "LORA"}'), "original")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    what = f"it holds a LoRA adapter, not a complete model: pass the folder of its base model {APPLY}"
    below = "original/ holds other weights: pass that folder to use them"
    message = f"no checkpoint in {str(tmp_path)!r}: {what}. {below}"
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}$"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "original").format == "meta"


OWN = ("pytorch_model", "tf_model", "flax_model", "__0_0", "global_step", "model-")


@pytest.mark.parametrize("name", [*OTHER_FORMATS, "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"])
def test_weights_of_other_programs_beside_the_base_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    base(tmp_path, "original")
    if not name.startswith(OWN):  # the file may be unrelated
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.path == tmp_path / "original"
        assert checkpoint.passed_over == ((tmp_path / name, "in another format"),)
        return
    message = f"no checkpoint in {str(tmp_path)!r}: {name} is "
    with pytest.raises(
        AssertionError, match=rf"^{re.escape(message)}.*original/ holds other weights: pass that folder"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.onnx", "x.ckpt", "a.pt"])
def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(AssertionError, match=r"^checkpoint folder .* is "):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state_0.pt", "training_args.bin", "optimizer.npz"]
)
def test_training_state_is_not_a_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(AssertionError, match=rf"; it holds {name}$"):
        open_checkpoint(tmp_path)
    base(tmp_path, "original")
    assert open_checkpoint(tmp_path).path == tmp_path / "original"


def test_a_folder_of_checkpoints_lists_them(tmp_path: Path) -> None:
    write_meta(tmp_path / "one", PARAMS, WEIGHTS)
    (tmp_path / "two").mkdir()
    huggingface(tmp_path / "two")
    base(tmp_path / "three", "original")
    (tmp_path / "logs").mkdir()
    found = ", ".join(str(tmp_path / name) for name in ("one", "three", "two"))
    with pytest.raises(AssertionError, match=rf"; pass the folder below it that holds one: {re.escape(found)}$"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["models--meta-llama--Llama-3.2-1B", "."])
def test_a_hugging_face_cache_lists_its_snapshots(tmp_path: Path, place: str) -> None:
    snapshot = tmp_path / place / "snapshots" / "4e20de3"
    snapshot.mkdir(parents=True)
    huggingface(snapshot)
    (tmp_path / place / "blobs").mkdir()
    with pytest.raises(
        AssertionError, match=rf"; pass the folder below it that holds one: {re.escape(str(snapshot))}$"
    ):
        open_checkpoint(tmp_path)


def test_a_hugging_face_cache_of_links_opens(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "4e20de3"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_tokenizer(huggingface(blobs))
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert Llama.build(str(snapshot), str(snapshot), 16, 1, device="cpu").generate([[1, 2]], 2)[0]
