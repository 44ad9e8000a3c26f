"""Every wrong argument: a clear error of the promised type before any work, and the next call works."""

import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastllama import Llama
from fastllama.distributed import parallel
from fastllama.memory_plan import DoesNotFit
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.tiny import MAX_SEQ_LEN, tiny_llama


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_meta(path, tiny_params(), random_weights(tiny_params()))
    write_tokenizer(path)
    return path


GENERATE_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-prompts": ({"prompt_tokens": []}, ValueError, "at least one prompt"),
    "empty-prompt": ({"prompt_tokens": [[1], []]}, ValueError, "prompt 1 is empty"),
    "flat-prompt": (
        {"prompt_tokens": [1, 2]},
        ValueError,
        "^prompt 0 must be a list of token ids, got 1: prompts are a list of lists, also for one prompt$",
    ),
    "float-token": ({"prompt_tokens": [[1.5]]}, ValueError, "token 0 of prompt 0 must be a whole number .* got 1.5"),
    "negative-token": (
        {"prompt_tokens": [[1, -1]]},
        ValueError,
        "token 1 of prompt 0 must be a whole number from 0 to 575, got -1",
    ),
    "token-past-end": ({"prompt_tokens": [[1], [576]]}, ValueError, "token 0 of prompt 1 .* got 576"),
    "too-many-rows": ({"prompt_tokens": [[1]] * 5}, AssertionError, "5 prompts .* max_batch_size of 4"),
    "too-long": ({"prompt_tokens": [[1] * 49]}, AssertionError, "49 tokens, .* max_seq_len of 48"),
    "negative-length": ({"max_gen_len": -1}, ValueError, "max_gen_len .* got -1"),
    "float-length": ({"max_gen_len": 2.0}, ValueError, "max_gen_len .* got 2.0"),
    "none-length": ({"max_gen_len": None}, ValueError, "max_gen_len .* got None"),
    "bool-length": ({"max_gen_len": True}, ValueError, "max_gen_len .* got True"),
    "negative-temperature": ({"temperature": -0.1}, ValueError, "temperature .* got -0.1"),
    "nan-temperature": ({"temperature": math.nan}, ValueError, "temperature .* got nan"),
    "infinite-temperature": ({"temperature": math.inf}, ValueError, "temperature .* got inf"),
    "text-temperature": ({"temperature": "0.5"}, ValueError, "temperature .* got '0.5'"),
    "negative-top-p": ({"top_p": -1}, ValueError, "top_p .* got -1"),
    "nan-top-p": ({"top_p": math.nan}, ValueError, "top_p .* got nan"),
    "none-top-p": ({"top_p": None}, ValueError, "top_p .* got None"),
    "text-seed": ({"seed": "1"}, ValueError, "a seed must be"),
    "float-seed": ({"seed": 1.0}, ValueError, "a seed must be"),
    "huge-seed": ({"seed": 2**64}, ValueError, "a seed must be"),
    "set-of-seeds": ({"seed": {1}}, ValueError, "a seed must be"),
    "bytes-temperature": ({"temperature": b"1"}, ValueError, "temperature"),
    "huge-temperature": ({"temperature": 10**400}, ValueError, "temperature"),
    "too-few-seeds": ({"prompt_tokens": [[1], [2]], "seed": [1]}, ValueError, "one for each of the 2 prompts, got 1"),
    "bad-seed-in-list": ({"seed": [None]}, ValueError, "a seed must be"),
}


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("case", GENERATE_ERRORS)
def test_generate_rejects(llm: Llama, call: str, case: str) -> None:
    changes, error, message = GENERATE_ERRORS[case]
    arguments: dict[str, Any] = {"prompt_tokens": [[1, 2, 3]], "max_gen_len": 4, "temperature": 0} | changes
    expected = llm.generate([[1, 2, 3]], 4, temperature=0)
    with pytest.raises(error, match=message):
        getattr(llm, call)(**arguments)  # a stream, too, refuses at the call and not at its first step
    assert llm.generate([[1, 2, 3]], 4, temperature=0) == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one text", "must be a list"),
        (None, "must be a list"),
        ([b"a"], "list of texts"),
        ([["a"]], "at place 0"),
        ([], "one"),
    ],
)
def test_text_completion_rejects(llm: Llama, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.text_completion(prompts, max_gen_len=2)
    assert llm.text_completion(["a"], max_gen_len=2)


BAD_DIALOGS: dict[str, tuple[Any, str]] = {
    "no-dialogs": ([], "at least one"),
    "empty-dialog": ([[{"role": "user", "content": "a"}], []], "dialog 1"),
    "no-role": ([[{"content": "a"}]], "dialog 0, message 0"),
    "no-content": ([[{"role": "user", "content": "a"}, {"role": "user"}]], "dialog 0, message 1"),
    "content-not-text": ([[{"role": "user", "content": 3}]], "dialog 0, message 0"),
    "role-not-text": ([[{"role": None, "content": "a"}]], "dialog 0, message 0"),
    "message-not-dict": ([["hello"]], "dialog 0, message 0"),
    "one-dialog-not-a-list": ([{"role": "user", "content": "a"}], "dialog 0"),
}


@pytest.mark.parametrize("case", BAD_DIALOGS)
def test_chat_completion_rejects(llm: Llama, case: str) -> None:
    dialogs, message = BAD_DIALOGS[case]
    with pytest.raises(ValueError, match=message):
        llm.chat_completion(dialogs, max_gen_len=2)
    assert llm.chat_completion([[{"role": "user", "content": "a"}]], max_gen_len=2)


def test_nan_logits_name_row_and_step_and_the_next_call_works(llm: Llama) -> None:
    expected = llm.generate([[1, 2], [3]], 4, temperature=0)
    table = llm.model.tok_embeddings
    poisoned, kept = expected[0][1][1], table[expected[0][1][1]].clone()
    with torch.no_grad():
        table[poisoned] = torch.nan
        with pytest.raises(ValueError, match=r"logits of row 1 .* at step 2 \(position 3\)"):
            llm.generate([[1, 2], [3]], 4, temperature=0)
        with pytest.raises(ValueError, match="row 0 .* at step 0"):
            llm.generate([[poisoned]], 4, temperature=0.5)
        with pytest.raises(ValueError, match="logits of row 0 are not finite numbers in its prompt"):
            llm.generate([[1, poisoned, 5]], 0, logprobs=True, echo=True)
        table[poisoned] = kept
    assert llm.generate([[1, 2], [3]], 4, temperature=0) == expected


def test_a_call_within_a_stream_is_refused_and_the_stream_goes_on(llm: Llama) -> None:
    expected, _ = llm.generate([[1, 2, 3]], 6, temperature=0)
    stream = llm.stream([[1, 2, 3]], 6, temperature=0)
    tokens = list(next(stream).tokens)
    waiting = [lambda: llm.generate([[1]], 2), lambda: llm.stream([[1]], 2), lambda: llm.text_completion(["a"])]
    for call in waiting:
        with pytest.raises(RuntimeError, match="busy with another call or an open stream"):
            call()
    for increment in stream:
        tokens += increment.tokens
    assert tokens == expected[0]


def test_forward_within_a_stream_is_refused(llm: Llama) -> None:
    expected, _ = llm.generate([[1, 2, 3]], 6, temperature=0)
    stream = llm.stream([[1, 2, 3]], 6, temperature=0)
    tokens = list(next(stream).tokens)
    with pytest.raises(RuntimeError, match="busy with another call or an open stream"):
        llm.model.forward(torch.tensor([[5, 6]]), 0)
    assert tokens + [token for increment in stream for token in increment.tokens] == expected[0]
    assert llm.model.forward(torch.tensor([[5, 6]]), 0).isfinite().all()


@pytest.mark.parametrize("stops", [None, 5, "ab", {1.5}, {"a"}], ids=str)
def test_stop_tokens_that_are_no_ids_are_refused(llm: Llama, stops: Any) -> None:
    before = llm.tokenizer.stop_tokens
    try:
        llm.tokenizer.stop_tokens = stops
        with pytest.raises(ValueError, match="tokenizer.stop_tokens must be a set or list of token ids"):
            llm.generate([[1]], 2)
        llm.tokenizer.stop_tokens = {2**70, -1}  # ids that cannot come are no harm
        assert llm.generate([[1]], 2)
    finally:
        llm.tokenizer.stop_tokens = before


def test_stop_tokens_may_be_a_tensor_and_seeds_an_array(llm: Llama) -> None:
    before = llm.tokenizer.stop_tokens
    tokens, _ = llm.generate([[1, 2, 3]], 6, temperature=0)
    try:
        llm.tokenizer.stop_tokens = torch.tensor([tokens[0][2]])  # type: ignore[assignment]
        assert llm.generate([[1, 2, 3]], 6, temperature=0)[0][0] == tokens[0][:2]
    finally:
        llm.tokenizer.stop_tokens = before
    drawn = llm.generate([[1], [2]], 6, 2.0, 1.0, seed=[3, 4])
    assert llm.generate([[1], [2]], 6, 2.0, 1.0, seed=np.array([3, 4])) == drawn  # type: ignore[arg-type]
    assert llm.generate([[1]], 6, seed=torch.tensor(3)) == llm.generate([[1]], 6, seed=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("temperature", "top_p"), [(1e39, 1.0), (1e300, 1.0), (1e-300, 1.0), (1.0, 5.0), (1.0, 1e300)])
def test_extreme_but_finite_parameters_work(llm: Llama, temperature: float, top_p: float) -> None:
    assert len(llm.generate([[1, 2]], 3, temperature, top_p)[0]) == 1


def test_top_p_above_one_keeps_everything(llm: Llama) -> None:
    expected = llm.generate([[1, 2]], 8, 2.0, 1.0, seed=1)
    assert llm.generate([[1, 2]], 8, 2.0, math.inf, seed=1) == llm.generate([[1, 2]], 8, 2.0, 3.0, seed=1) == expected


def test_build_takes_any_kind_of_integer(folder: Path) -> None:
    path = str(folder), str(folder / "tokenizer.model")
    llm = Llama.build(*path, np.int64(16), np.int32(2), np.int64(1), device="cpu")  # type: ignore[arg-type]
    assert llm.model.params.max_seq_len == 16 and type(llm.model.params.max_seq_len) is int


@pytest.mark.parametrize("name", ["ckpt_dir", "tokenizer_path"])
def test_build_rejects_what_is_no_path(folder: Path, name: str) -> None:
    arguments: dict[str, Any] = {"ckpt_dir": str(folder), "tokenizer_path": str(folder / "tokenizer.model"), name: None}
    with pytest.raises(ValueError, match=f"{name} must be a path, got None"):
        Llama.build(max_seq_len=16, max_batch_size=1, **arguments)


def test_a_concurrent_call_is_refused(llm: Llama) -> None:
    stream = llm.stream([[1, 2, 3]], 6)
    next(stream)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            llm.generate([[1]], 2)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    stream.close()
    assert len(errors) == 1
    assert llm.generate([[1]], 2)


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


def test_build_needs_all_that_torchrun_sets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a process where no oracle has made groups of its own.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.delitem(sys.modules, parallel.FAIRSCALE_GROUPS, raising=False)
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


def test_build_says_what_would_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.memory_plan.free_memory", lambda device: 4_000_000)
    with pytest.raises(DoesNotFit, match=r"needs .* GiB .* max_batch_size=\d+ would fit") as caught:
        Llama.build(str(folder), str(folder / "tokenizer.model"), 64, 512, device="cpu")
    assert isinstance(caught.value, MemoryError) and isinstance(caught.value, ValueError)


def test_long_contexts_need_scaled_rope(tmp_path: Path) -> None:
    llm = tiny_llama(tmp_path, max_seq_len=9000, use_scaled_rope=True)
    assert llm.model.params.max_seq_len == 9000 and llm.tokenizer.llama31
    assert llm.generate([[1, 2]], 2, temperature=0)


def test_prompts_may_be_tuples_arrays_and_tensors(llm: Llama) -> None:
    expected = llm.generate([[1, 2, 3]], 4, temperature=0)
    assert llm.generate(((1, 2, 3),), 4, temperature=0) == expected
    assert llm.generate(torch.tensor([[1, 2, 3]]), 4, temperature=0) == expected  # type: ignore[arg-type]


def test_context_of_one_token(tmp_path: Path) -> None:
    llm = tiny_llama(tmp_path, max_seq_len=1)
    assert llm.generate([[5]], 4) == ([[]], None)
    assert MAX_SEQ_LEN > 1
