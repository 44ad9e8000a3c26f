"""Whatever a body holds, it is a request with an answer in JSON, or refused with a reason."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama import Llama, Result, strict_json
from fastllama.engine import Answer
from fastllama.openai_api.envelope import ServedModel
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.known_fields import CHATS, COMPLETIONS, RESPONSES
from fastllama.openai_api.requests import ApiRequest, chat_request, completion_request
from fastllama.openai_api.responses import response
from fastllama.openai_api.responses_api import responses_request
from fastllama.openai_api.responses_events import response_object

NAMES = sorted(
    {*(name for kind in (COMPLETIONS, CHATS, RESPONSES) for name in (*kind.honoured, *kind.refused)), "unknown"}
)
MEMBERS = ["role", "content", "type", "text", "5", "x", "function", "name", "parameters", "json_schema", "schema", "id"]
MEMBERS += [
    "tool_calls",
    "tool_call_id",
    "arguments",
    "mode",
    "tools",
    "allowed_tools",
    "include_usage",
    "format",
    "$ref",
    "anyOf",
]
WORDS = ["function", "json_schema", "allowed_tools", "object", "tool", "assistant", "text", "{}", "auto"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=4),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
HELLO = [{"role": "user", "content": "x"}]
TOOL: dict[str, Any] = {"type": "function", "name": "f"}
NUMBERS = ["1e999", "-1e999", "NaN", "Infinity", "-Infinity"]


def answer_of(llm: Llama, body: str, parse: str, allow_unknown: bool) -> dict[str, Any]:
    """The body of an answer to a body in JSON, as a server reads it. Raises InvalidRequest."""
    value = strict_json.loads(body, allow_nan=False)
    result = Result([1, 2], [Answer(0, "Hello", [5], finish_reason="stop")])
    if parse == "responses":
        found = responses_request(value, formatter=llm.formatter, allow_unknown=allow_unknown)
        return response_object(found, result, llm.tokenizer, "m")
    request = (
        completion_request(value, allow_unknown=allow_unknown)
        if parse == "completions"
        else chat_request(value, formatter=llm.formatter, allow_unknown=allow_unknown)
    )
    assert isinstance(request, ApiRequest)
    return response(request, [result] * len(request.prompts), ServedModel("m", llm.tokenizer))


def test_a_body_is_a_request_or_refused(llm: Llama) -> None:
    @given(body=BODIES, value=VALUES, allow_unknown=st.booleans())
    def run(body: dict[str, Any], value: Any, allow_unknown: bool) -> None:
        chat: dict[str, Any] = {"messages": HELLO}
        items: dict[str, Any] = {"input": "x"}
        bodies: list[Any] = [body, value, body | {"prompt": "x"}, body | chat, body | items, {"messages": [value]}]
        bodies += [body | chat | {"tools": [value]}, body | chat | {"response_format": value}, {"input": [value]}]
        bodies += [items | {"tools": [TOOL | {"parameters": value, "x": value}]}, items | {"text": {"format": value}}]
        bodies += [items | {"tools": [TOOL], "tool_choice": value}]
        for parse in ("completions", "chats", "responses"):
            for one in bodies:
                check(llm, json.dumps(one), parse, allow_unknown)

    run()


def check(llm: Llama, body: str, parse: str, allow_unknown: bool) -> None:
    try:
        answer = answer_of(llm, body, parse, allow_unknown)
    except InvalidRequest as error:
        assert str(error) and error.code
    except ValueError as error:
        assert "is not a finite number" in str(error)
    else:
        json.dumps(answer, allow_nan=False)


WITH_A_NUMBER: dict[str, dict[str, Any]] = {
    "tools": {"tools": [TOOL | {"x": "NUMBER"}]},
    "text": {"text": {"format": {"type": "text", "x": "NUMBER"}}},
    "tool_choice": {"tools": [TOOL], "tool_choice": TOOL | {"x": "NUMBER"}},
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("field", WITH_A_NUMBER)
def test_what_an_answer_repeats_is_finite(llm: Llama, field: str, number: str) -> None:
    body = json.dumps({"input": "x"} | WITH_A_NUMBER[field])
    with pytest.raises(ValueError, match="is not a finite number"):
        answer_of(llm, body.replace('"NUMBER"', number), "responses", True)
    json.dumps(answer_of(llm, body.replace('"NUMBER"', "1e99"), "responses", True), allow_nan=False)
