"""Errors of generate, stream and the completion calls: clear messages, and the next call works."""

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch

from fastllama import Llama
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


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
        getattr(llm, call)(**arguments)  # stream checks at the call, not at its first step
    assert llm.generate([[1, 2, 3]], 4, temperature=0) == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one text", "must be a list"),
        (None, "must be a list"),
        ([b"a"], "list of texts"),
        ([["a"]], "at index 0"),
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
    calls = [lambda: llm.generate([[1]], 2), lambda: llm.stream([[1]], 2), lambda: llm.text_completion(["a"])]
    for call in calls:
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
def test_stop_tokens_that_are_not_ids_are_refused(llm: Llama, stops: Any) -> None:
    before = llm.tokenizer.stop_tokens
    try:
        llm.tokenizer.stop_tokens = stops
        with pytest.raises(ValueError, match="tokenizer.stop_tokens must be a set or list of token ids"):
            llm.generate([[1]], 2)
        llm.tokenizer.stop_tokens = {2**70, -1}  # ids outside the vocabulary are ignored
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


def test_top_p_above_one_keeps_all_tokens(llm: Llama) -> None:
    expected = llm.generate([[1, 2]], 8, 2.0, 1.0, seed=1)
    assert llm.generate([[1, 2]], 8, 2.0, math.inf, seed=1) == llm.generate([[1, 2]], 8, 2.0, 3.0, seed=1) == expected


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


def test_prompts_may_be_tuples_arrays_and_tensors(llm: Llama) -> None:
    expected = llm.generate([[1, 2, 3]], 4, temperature=0)
    assert llm.generate(((1, 2, 3),), 4, temperature=0) == expected
    assert llm.generate(torch.tensor([[1, 2, 3]]), 4, temperature=0) == expected  # type: ignore[arg-type]
