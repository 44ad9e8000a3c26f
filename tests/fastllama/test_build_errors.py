"""Errors of `Llama.build`: each wrong argument or file raises the documented type of error, with a clear message."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastllama import Llama, Tokenizer
from fastllama.distributed import model_parallel
from fastllama.memory_plan import DoesNotFit
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.tiny import MAX_SEQ_LEN, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_meta(path, tiny_params(), random_weights(tiny_params()))
    write_tokenizer(path)
    return path


def test_build_takes_any_kind_of_integer(folder: Path) -> None:
    path = str(folder), str(folder / "tokenizer.model")
    llm = Llama.build(*path, np.int64(16), np.int32(2), np.int64(1), device="cpu")  # type: ignore[arg-type]
    assert llm.model.params.max_seq_len == 16 and type(llm.model.params.max_seq_len) is int


@pytest.mark.parametrize("name", ["ckpt_dir", "tokenizer_path"])
def test_build_rejects_values_that_are_not_paths(folder: Path, name: str) -> None:
    arguments: dict[str, Any] = {"ckpt_dir": str(folder), "tokenizer_path": str(folder / "tokenizer.model"), name: 7}
    with pytest.raises(ValueError, match=f"{name} must be a path, got 7"):
        Llama.build(max_seq_len=16, max_batch_size=1, **arguments)


BUILD_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "zero-length": ({"max_seq_len": 0}, AssertionError, "max_seq_len must be a whole number from 1 to"),
    "too-long": (
        {"max_seq_len": 8193},
        AssertionError,
        "from 1 to 8192, got 8193 for a checkpoint without scaled rope",
    ),
    "far-too-long": ({"max_seq_len": 131073}, AssertionError, "1 to 131072, got 131073"),
    "float-length": ({"max_seq_len": 16.0}, AssertionError, "max_seq_len"),
    "no-folder": ({"ckpt_dir": "nowhere"}, AssertionError, "folder 'nowhere' does not exist"),
    "no-tokenizer": ({"tokenizer_path": "nowhere.model"}, AssertionError, "tokenizer file 'nowhere.model'"),
    "no-rows": ({"max_batch_size": 0}, ValueError, "max_batch_size"),
    "text-rows": ({"max_batch_size": "4"}, ValueError, "max_batch_size"),
    "bad-seed": ({"seed": "x"}, ValueError, "seed"),
    "bad-device": ({"device": "abacus"}, ValueError, 'device must be "cpu", "cuda"'),
    "absent-device": ({"device": "cuda:99"}, ValueError, "torch sees"),
    "bad-dtype": ({"dtype": "int8"}, ValueError, "dtype must be one of float32"),
    "wide-dtype": ({"dtype": torch.float64}, ValueError, "dtype must be one of float32"),
    "bad-backend": ({"backend": "abacus"}, ValueError, "backend must be one of 'reference', 'fused'"),
    "two-processes": ({"model_parallel_size": 2}, ValueError, "asks for 2 processes"),
    "bad-processes": ({"model_parallel_size": 0}, ValueError, "model_parallel_size"),
    "bad-rope-factor": ({"rope_scaling_factor": -1.0}, ValueError, "rope_scaling_factor"),
}


@pytest.mark.parametrize("case", BUILD_ERRORS)
def test_build_rejects(folder: Path, case: str) -> None:
    changes, error, message = BUILD_ERRORS[case]
    arguments: dict[str, Any] = {
        "ckpt_dir": str(folder),
        "tokenizer_path": str(folder / "tokenizer.model"),
        "max_seq_len": 16,
        "max_batch_size": 2,
        "device": "cpu",
    }
    with pytest.raises(error, match=message):
        Llama.build(**(arguments | changes))
    assert Llama.build(**arguments).generate([[1]], 2)


def test_build_needs_all_variables_of_torchrun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a process in which Meta's reference model has not created process groups.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.delitem(sys.modules, model_parallel.FAIRSCALE_GROUPS, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="WORLD_SIZE asks for 2 processes and RANK, MASTER_ADDR, MASTER_PORT are not set"
    ):
        Llama.build(str(folder), str(folder / "tokenizer.model"), 16, 2, device="cpu")
    with pytest.raises(ValueError, match="asks for 3 processes and 2 were started"):
        Llama.build(str(folder), str(folder / "tokenizer.model"), 16, 2, 3, device="cpu")
    for name, value in {"RANK": "7", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="RANK must be a number from 0 to 1, as WORLD_SIZE is 2, got '7'"):
        Llama.build(str(folder), str(folder / "tokenizer.model"), 16, 2, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Llama.build(str(folder), str(folder / "tokenizer.model"), 16, 2, device="cpu").generate([[1]], 2)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE must be a number"):
        Llama.build(str(folder), str(folder / "tokenizer.model"), 16, 2, device="cpu")


def test_build_rejects_a_folder_without_weights(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(AssertionError, match="no checkpoint in"):
        Llama.build(str(tmp_path), str(folder / "tokenizer.model"), 16, 2)


def test_build_rejects_a_tokenizer_of_another_vocabulary(tmp_path: Path, folder: Path) -> None:
    other = write_tokenizer(tmp_path, n_ranks=300)
    with pytest.raises(AssertionError, match="vocabulary of 576 and the tokenizer one of 556"):
        Llama.build(str(folder), str(other), 16, 2)


def test_build_names_sizes_that_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.memory_plan.free_memory", lambda device: 4_000_000)
    with pytest.raises(DoesNotFit, match=r"needs .* GiB .* max_batch_size=\d+ would fit") as caught:
        Llama.build(str(folder), str(folder / "tokenizer.model"), 64, 512, device="cpu")
    assert isinstance(caught.value, MemoryError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graphs": "no"}, "cuda_graphs must be True, False or None, got 'no'"),
        ({"dependent_launch": 0}, "dependent_launch must be True, False or None, got 0"),
        ({"cuda_graphs": True}, "cuda_graphs needs a GPU, and the device is 'cpu': leave it out"),
        ({"dependent_launch": True}, "dependent_launch needs a GPU, and the device is 'cpu': leave it out"),
    ],
)
def test_wrong_launch_options_are_refused_before_any_file_is_read(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        Llama.build(str(tmp_path), str(tmp_path), 8, 2, device="cpu", **options)
    assert str(caught.value) == message


def test_long_contexts_need_scaled_rope(tmp_path: Path) -> None:
    llm = tiny_llama(tmp_path, max_seq_len=9000, use_scaled_rope=True)
    assert isinstance(llm.tokenizer, Tokenizer) and llm.tokenizer.llama31
    assert llm.model.params.max_seq_len == 9000
    assert llm.generate([[1, 2]], 2, temperature=0)


def test_context_of_one_token(tmp_path: Path) -> None:
    llm = tiny_llama(tmp_path, max_seq_len=1)
    assert llm.generate([[5]], 4) == ([[]], None)
    assert MAX_SEQ_LEN > 1
