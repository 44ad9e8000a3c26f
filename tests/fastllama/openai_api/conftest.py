"""One model that all tests of the API share."""

from collections.abc import Callable
from typing import Any

import pytest

from fastllama import Llama, builtin_checkpoint
from fastllama.openai_api.envelope import ServedModel
from fastllama.openai_api.requests import chat_request, completion_request, submit
from fastllama.openai_api.responses import response

MAX_SEQ_LEN = 256
Answering = Callable[..., dict[str, Any]]


@pytest.fixture(scope="package")
def llm() -> Llama:
    folder, tokenizer = builtin_checkpoint()
    return Llama.build(folder, tokenizer, MAX_SEQ_LEN, 4, device="cpu")


def answer_of(llm: Llama, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a body, a chat if it has messages."""
    is_chat = "messages" in body
    request = chat_request(body, formatter=llm.formatter) if is_chat else completion_request(body)
    results = [one.result() for one in submit(llm.engine(reuse_prefixes=False), request)]
    return response(request, results, ServedModel("served", llm.tokenizer))


@pytest.fixture
def answered(llm: Llama) -> Answering:
    """Answers a body: answered(prompt="Once", max_tokens=4)."""
    return lambda **body: answer_of(llm, body)
