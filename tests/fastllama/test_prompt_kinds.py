"""Values of the wrong type for every argument of every call: the error names the type and what to pass instead."""

import array
import collections
import re
from typing import Any

import numpy as np
import pytest
import torch

from fastllama import Llama
from fastllama.generation import sample_top_p
from tests.support.tiny import tiny_llama

ENCODE = ": encode it first, tokenizer.encode(text, bos=True, eos=False), or call text_completion"
DECODE = ": decode it to a str and encode that, tokenizer.encode(text, bos=True, eos=False)"
ORDER = ": make it a list, in the order of the text"
DIMENSIONS = "prompt 0 must be token ids, whole numbers in one dimension, got "
ALONE = ": prompts are a list of lists, also for one prompt"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


# Values that are not a list of prompts, or not a prompt: (value, its name in the message, what to do instead).
KINDS: dict[str, tuple[Any, str, str]] = {
    "text": ("text", "str ('text')", ENCODE),
    "no-text": ("", "str ('')", ENCODE),
    "user-string": (collections.UserString("ab"), "UserString ('ab')", ENCODE),
    "bytes": (b"abc", "bytes (b'abc')", DECODE),
    "bytearray": (bytearray(b"a"), "bytearray (bytearray(b'a'))", DECODE),
    "set": ({1}, "set ({1})", ORDER),
    "frozenset": (frozenset({1}), "frozenset (frozenset({1}))", ORDER),
    "dict": ({1: 2}, "dict ({1: 2})", ORDER),
    "keys": ({1: 2}.keys(), "dict_keys (dict_keys([1]))", ORDER),
    "none": (None, "None", ""),
    "float": (1.5, "1.5", ""),
    "bool": (True, "True", ""),
    "object": (Ellipsis, "ellipsis (Ellipsis)", ""),
    "meta-tensor": (torch.zeros(1, 2, dtype=torch.int64, device="meta"), "Tensor of shape (1, 2) and torch.int64", ""),
}
PROMPT_KINDS: dict[str, tuple[Any, str, str]] = KINDS | {
    "int": (3, "3", ALONE),
    "numpy-int": (np.int64(3), "int64 of shape () and int64", ALONE),
    "tensor-of-no-dimension": (torch.tensor(3), "Tensor of shape () and torch.int64", ALONE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_a_list_of_prompts(llm: Llama, kind: str) -> None:
    value, named, remedy = KINDS[kind]
    message = re.escape(f"prompts must be a list of lists of token ids, got {named}{remedy}")
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call(value, 2)
    assert llm.generate([[1]], 2, temperature=0)


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_values_that_are_not_a_prompt(llm: Llama, kind: str) -> None:
    value, named, remedy = PROMPT_KINDS[kind]
    message = re.escape(f"prompt 1 must be a list of token ids, got {named}{remedy}")
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call([[1, 2], value], 2)


def test_generators_are_refused_where_order_and_length_matter(llm: Llama) -> None:
    with pytest.raises(ValueError, match=f"^prompts must be a list of lists of token ids, got generator{ORDER}$"):
        llm.generate(([1] for _ in range(2)), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^prompt 0 must be a list of token ids, got list_iterator{ORDER}$"):
        llm.generate([iter([1, 2])], 2)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([1.0, 2.0]), DIMENSIONS + "ndarray of shape (2,) and float64"),
        (torch.tensor([0.5]), DIMENSIONS + "Tensor of shape (1,) and torch.float32"),
        (torch.tensor([[1], [2]]), DIMENSIONS + "Tensor of shape (2, 1) and torch.int64"),
        (torch.tensor([True]), DIMENSIONS + "Tensor of shape (1,) and torch.bool"),
        ([1, True], "token 1 of prompt 0 must be a whole number from 0 to 575, got True"),
        ([1, "a"], "token 1 of prompt 0 must be a whole number from 0 to 575, got 'a'"),
        ([np.float32(1)], f"token 0 of prompt 0 must be a whole number from 0 to 575, got {np.float32(1)!r}"),
        ([torch.tensor([1])], "token 0 of prompt 0 must be a whole number from 0 to 575, got tensor([1])"),
        ([np.bool_(True)], f"token 0 of prompt 0 must be a whole number from 0 to 575, got {np.bool_(True)!r}"),
        (np.array([3, 576]), "token 1 of prompt 0 must be a whole number from 0 to 575, got 576"),
        (range(575, 577), "token 1 of prompt 0 must be a whole number from 0 to 575, got 576"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_are_not_tokens(llm: Llama, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        llm.generate([prompt], 2)


def test_sequences_of_every_kind_are_prompts(llm: Llama) -> None:
    expected = llm.generate([[1, 2, 3]], 3, temperature=0)
    same: list[Any] = [
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3], dtype=np.uint16),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        array.array("i", [1, 2, 3]),
        collections.deque([1, 2, 3]),
        [np.int32(1), torch.tensor(2), 3],
    ]
    for prompt in same:
        assert llm.generate([prompt], 3, temperature=0) == llm.generate((prompt,), 3, temperature=0) == expected
    for prompts in (np.array([[1, 2, 3]]), torch.tensor([[1, 2, 3]]), collections.deque([[1, 2, 3]])):
        assert llm.generate(prompts, 3, temperature=0) == expected  # type: ignore[arg-type]


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "text-logprobs": ({"logprobs": "False"}, "logprobs must be True or False, got str ('False')"),
    "bytes-echo": ({"echo": b"no"}, "echo must be True or False, got bytes (b'no')"),
    "array-echo": ({"echo": np.array([1, 2])}, "echo must be True or False, got ndarray of shape (2,) and int64"),
    "array-temperature": (
        {"temperature": np.array([0.5])},
        "temperature must be 0 (the most likely token) or a positive number, got array([0.5])",
    ),
    "complex-temperature": (
        {"temperature": 1j},
        "temperature must be 0 (the most likely token) or a positive number, got 1j",
    ),
    "bool-top-p": (
        {"top_p": True},
        "top_p must be a number from 0 (the most likely token) to 1 (the whole vocabulary), got True",
    ),
    "array-length": (
        {"max_gen_len": np.array([2])},
        "max_gen_len must be a whole number of at least 0, got array([2])",
    ),
    "bool-tensor-length": (
        {"max_gen_len": torch.tensor(True)},
        "max_gen_len must be a whole number of at least 0, got tensor(True)",
    ),
    "bytearray-seed": (
        {"seed": bytearray(b"a")},
        f"a seed must be a whole number from {-(2**63)} to {2**64 - 1}, got bytearray(b'a')",
    ),
    "float-array-seeds": (
        {"seed": np.array([1.5])},
        f"a seed must be a whole number from {-(2**63)} to {2**64 - 1}, got {np.float64(1.5)!r}",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_the_wrong_type(llm: Llama, case: str) -> None:
    changes, message = ARGUMENTS[case]
    calls: dict[str, Any] = {"generate": {"prompt_tokens": [[1]]}, "text_completion": {"prompts": ["a"]}}
    for name, arguments in calls.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            getattr(llm, name)(**(arguments | {"max_gen_len": 2} | changes))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one text", "got str ('one text'): for one text pass [text]"),
        (b"ab", f"got bytes (b'ab'){DECODE}"),
        ({"a"}, f"got set ({{'a'}}){ORDER}"),
        ({"a": 1}, f"got dict ({{'a': 1}}){ORDER}"),
        (3, "got 3"),
        ([b"ab"], "got bytes (b'ab') at index 0"),
        (["a", [1, 2]], "got list ([1, 2]) at index 1"),
    ],
    ids=str,
)
def test_values_that_are_not_texts(llm: Llama, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('prompts must be a list of texts, ' + message)}$"):
        llm.text_completion(prompts, max_gen_len=2)


MESSAGE = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("dialogs", "message"),
    [
        ([MESSAGE], "dialog 0 must be a list of messages, got dict (*): for one dialog pass [dialog], a list of it"),
        (MESSAGE, "dialogs must be a list of dialogs, got dict (*)"),
        ("hello", "dialogs must be a list of dialogs, got str ('hello')"),
        (None, "dialogs must be a list of dialogs, got None"),
        (["hello"], "dialog 0: expected a list of messages, got str"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_are_not_dialogs(llm: Llama, dialogs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message).replace(re.escape('*'), '.*')}$"):
        llm.chat_completion(dialogs, max_gen_len=2)


@pytest.mark.parametrize(
    "stops", [b"ab", bytearray(b"a"), {1: 2}, iter([1]), np.array(3)], ids=lambda v: type(v).__name__
)
def test_stop_tokens_of_the_wrong_type(llm: Llama, stops: Any) -> None:
    before = llm.tokenizer.stop_tokens
    try:
        llm.tokenizer.stop_tokens = stops
        with pytest.raises(ValueError, match="^tokenizer.stop_tokens must be a set or list of token ids, got .*$"):
            llm.generate([[1]], 2)
    finally:
        llm.tokenizer.stop_tokens = before


@pytest.mark.parametrize("tokens", [b"ab", bytearray(b"a"), {1, 2}, {1: 2}], ids=lambda value: type(value).__name__)
def test_decode_takes_ids_in_order(llm: Llama, tokens: Any) -> None:
    kind = type(tokens).__name__
    with pytest.raises(ValueError, match=f"^decode takes a sequence of token ids, got .*, a {kind}$"):
        llm.tokenizer.decode(tokens)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.complex64], ids=str)
def test_forward_takes_integers(llm: Llama, dtype: torch.dtype) -> None:
    message = f"tokens must be a tensor of integers of shape (B, S), got {dtype} of (1, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        llm.model.forward(torch.ones(1, 2, dtype=dtype), 0)


@pytest.mark.parametrize("probs", [None, [[0.5, 0.5]], torch.tensor([[1, 0]])], ids=lambda value: type(value).__name__)
def test_sample_top_p_takes_probabilities(probs: Any) -> None:
    with pytest.raises(ValueError, match=r"^probs must have shape \(B, V\), got .*$"):
        sample_top_p(probs, 0.5)
