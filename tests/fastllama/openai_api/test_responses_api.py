"""/v1/responses: bodies, every refusal, the object of an answer, and the events of a stream."""

import json
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseIncludable, ResponseStreamEvent
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming,
    ResponseCreateParamsStreaming,
    StreamOptions,
)
from openai.types.responses.response_text_config_param import ResponseTextConfigParam
from openai.types.shared_params import Reasoning

from fastllama import Llama, Result, SamplingParams
from fastllama.engine import Answer
from fastllama.engine.sequence import Increment
from fastllama.openai_api.errors import AnswerFailed, InvalidRequest
from fastllama.openai_api.known_fields import (
    CHATS,
    COMPLETIONS,
    RESPONSES,
    STREAM_OPTIONS,
    UNSUPPORTED_STREAM_OPTIONS,
)
from fastllama.openai_api.requests import chat_request, encode, submit
from fastllama.openai_api.responses_api import (
    INCLUDABLE,
    LOGPROBS,
    UNSUPPORTED_REASONING,
    UNSUPPORTED_TEXT,
    ResponsesRequest,
    responses_request,
)
from fastllama.openai_api.responses_events import ResponseWriter, response_object
from tests.fastllama.openai_api.conftest import MAX_SEQ_LEN
from tests.fastllama.openai_api.tool_models import CLOCK, HERMES, WEATHER, formatter_of, match

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
FLAT = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]
CALL = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Paris"}'}
CLOCK_CALL = '{"name": "clock", "parameters": {}}'
EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])
}


def parse(llm: Llama, **body: Any) -> ResponsesRequest:
    return responses_request({"input": FRANCE, "temperature": 0} | body, formatter=llm.formatter)


def dialog_of(llm: Llama, **body: Any) -> Any:
    return parse(llm, **body).request.prompts[0]


def checked(events: Sequence[dict[str, Any]], first: int = 0) -> list[str]:
    """The types of events, each of which is one of the package's, and numbered in order."""
    for number, event in enumerate(events, start=first):
        assert event["sequence_number"] == number
        EVENTS[event["type"]].model_validate(json.loads(json.dumps(event)), strict=True)
    return [event["type"] for event in events]


def finished(text: str, reason: Any = "stop", error: str | None = None) -> Result:
    return Result([1, 2, 3], [Answer(0, text, [5] * 4, finish_reason=reason, error=error)], cached_tokens=2)


def test_every_field_is_translated(llm: Llama) -> None:
    sampling: dict[str, Any] = {"temperature": 0.5, "top_p": 0.8, "seed": 7, "stop": ["a"], "top_k": 9, "min_p": 0.1}
    request = parse(llm, **sampling, max_output_tokens=9, model="name", stream=True).request
    assert request.params == SamplingParams(max_gen_len=9, **{**sampling, "stop": ("a",)})
    assert (request.model, request.stream, request.prompt_field, request.is_chat) == ("name", True, "input", True)
    plain = responses_request({"input": "x"}).request
    assert plain.params == SamplingParams(temperature=1, top_p=1)
    assert plain.prompts == [[{"role": "user", "content": "x"}]]


@pytest.mark.parametrize(
    ("more", "logprobs"),
    [
        ({}, None),
        ({"include": [LOGPROBS]}, 0),
        ({"include": [LOGPROBS], "top_logprobs": 3}, 3),
        ({"top_logprobs": 2}, 2),
        ({"top_logprobs": 0}, None),
        ({"include": ["reasoning.encrypted_content"]}, None),
    ],
    ids=str,
)
def test_log_probabilities_are_included(llm: Llama, more: dict[str, Any], logprobs: int | None) -> None:
    assert parse(llm, **more).request.params.logprobs == logprobs


def test_items_are_messages_calls_and_results(llm: Llama) -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be good."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant"}
        | {"content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {**CALL, "id": "fc_1", "status": "completed"},
        {**CALL, "call_id": "call_2", "name": "clock", "arguments": ""},
        {"type": "function_call_output", "call_id": "call_2", "output": "noon"},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "21"}]},
        {**CALL, "call_id": "call_3"},
    ]
    calls = [("call_1", "get_weather", {"city": "Paris"}), ("call_2", "clock", {})]
    expected = [
        {"role": "system", "content": "Hello.\n\nBe good."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "I look.", "tool_calls": [called(*call) for call in calls]},
        {"role": "tool", "tool_call_id": "call_2", "name": "clock", "content": "noon"},
        {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "21"},
        {"role": "assistant", "tool_calls": [called("call_3", "get_weather", {"city": "Paris"})]},
    ]
    assert dialog_of(llm, input=items, instructions="Hello.") == expected
    assert dialog_of(llm, input=items[1:2], instructions="Hello.")[0] == {"role": "system", "content": "Hello."}


def called(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tools_and_formats_are_a_chats_in_a_flat_form(llm: Llama) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": FRANCE}], "temperature": 0}
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    choices: list[tuple[Any, Any]] = [
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "name": "clock"}, {"type": "function", "function": {"name": "clock"}}),
    ]
    names = [{"type": "function", "name": "clock"}], [{"type": "function", "function": {"name": "clock"}}]
    allowed = [{"mode": "auto", "tools": one} for one in names]
    choices.append(({"type": "allowed_tools", **allowed[0]}, {"type": "allowed_tools", "allowed_tools": allowed[1]}))
    for ours, theirs in choices:
        flat = parse(llm, tools=FLAT, tool_choice=ours, parallel_tool_calls=False).request
        body = chat | {"tools": [WEATHER, CLOCK], "tool_choice": theirs, "parallel_tool_calls": False}
        same = chat_request(body, formatter=llm.formatter)
        assert (flat.params, flat.tools, flat.prompts) == (same.params, same.tools, same.prompts)
    flat = parse(llm, text={"format": {"type": "json_schema", **schema}}).request
    same = chat_request(chat | {"response_format": {"type": "json_schema", "json_schema": schema}})
    assert flat.params == same.params and flat.params.grammar is not None
    assert match(flat.params.grammar, llm.tokenizer, '{"a": 5}') == "whole"
    assert parse(llm, text={"format": {"type": "text"}, "verbosity": "medium"}).request.params.grammar is None


IMAGE = [{"type": "input_image", "image_url": "x"}]
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "the body has no input"),
    ({"input": []}, "input", "must be a text or a list of items"),
    ({"input": {"role": "user"}}, "input", "must be a text or a list of items"),
    ({"input": ["x"]}, "input[0]", "must be an object"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type", "'reasoning'"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "'item_reference'"),
    ({"input": [{"type": ["message"]}]}, "input[0].type", "must be message"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "one of system, developer, user, assistant,"),
    ({"input": [{"role": "user", "content": IMAGE}]}, "input[0].content", "parts of the type input_text"),
    ({"input": [{"role": "user"}]}, "input[0].content", "must be a text"),
    ({"input": [{**CALL, "call_id": 5}]}, "input[0].call_id", "must be a text"),
    ({"input": [{**CALL, "name": None}]}, "input[0].name", "must be a text"),
    ({"input": [{**CALL, "arguments": "{"}]}, "input[0].arguments", "JSON text of an object"),
    (
        {"input": [CALL, {"type": "function_call_output", "call_id": "x", "output": "y"}]},
        "input[1].call_id",
        "the id of a call",
    ),
    ({"input": [CALL, {"type": "function_call_output", "call_id": "call_1"}]}, "input[1].output", "must be a text"),
    ({"instructions": ["x"]}, "instructions", "must be a text"),
    ({"include": "x"}, "include", "must be a list"),
    ({"include": ["message.logprobs"]}, "include", "got 'message.logprobs'"),
    ({"include": [[]]}, "include", "include may have"),
    ({"top_logprobs": 21}, "top_logprobs", "top_logprobs must be"),
    ({"max_output_tokens": -1}, "max_output_tokens", "max_output_tokens must be"),
    ({"metadata": "x"}, "metadata", "must be an object of texts"),
    ({"metadata": {"x": 5}}, "metadata", "must be an object of texts"),
    ({"user": 5}, "user", "must be a text"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort", "is not supported"),
    ({"reasoning": "low"}, "reasoning", "must be an object"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "is not supported"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "must be one of"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "text.format has no name"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
        "text.format.schema",
        '"not"',
    ),
    ({"tools": [WEATHER]}, "tools[0].function", "is not a field of tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "only functions are"),
    ({"tools": [{**FLAT[0], "parameters": []}]}, "tools[0].parameters", "JSON schema"),
    (
        {"tools": [FLAT[1], {**FLAT[0], "strict": True, "parameters": {"not": {}}}]},
        "tools[1].parameters",
        '"not"',
    ),
    ({"tools": FLAT, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "one of the tools"),
    ({"tools": FLAT, "tool_choice": {"type": "web_search_preview"}}, "tool_choice.type", "is not supported"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", "needs stream to be true"),
    ({"n": 2}, "n", "is not supported"),
    ({"messages": []}, "messages", "use input instead"),
    ({"max_tokens": 5}, "max_tokens", "use max_output_tokens instead"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "use max_output_tokens instead"),
    ({"response_format": {"type": "json_object"}}, "response_format", "use text.format instead"),
    ({"guided_json": {}}, "guided_json", "use text.format instead"),
    ({"logprobs": True}, "logprobs", "use include or top_logprobs instead"),
    ({"skip_special_tokens": True}, "skip_special_tokens", "leave it out"),
    ({"message": []}, "message", "'message' is not a field of this request"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=[f"{param}-{text}" for _, param, text in BAD])
def test_what_is_wrong_is_named(llm: Llama, body: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(llm, **body)
    assert caught.value.param == param and message in str(caught.value)


@pytest.mark.parametrize("name", sorted(RESPONSES.refused))
def test_unsupported_fields_are_refused_unless_they_ask_for_nothing(llm: Llama, name: str) -> None:
    for neutral in RESPONSES.refused[name]:
        assert parse(llm, **{name: neutral}) == parse(llm)
    with pytest.raises(InvalidRequest, match=f"{name} is not supported") as caught:
        parse(llm, **{name: {"some": "thing"}})
    assert caught.value.param == name


def test_every_field_of_the_openai_package_is_sorted() -> None:
    names = set(get_type_hints(ResponseCreateParamsStreaming)) | set(get_type_hints(ResponseCreateParamsNonStreaming))
    assert {"input", "stream"} < names
    known = RESPONSES.honoured | RESPONSES.without_effect | set(RESPONSES.refused)
    assert names <= known
    for other in (CHATS, COMPLETIONS):  # what they honour or refuse is not ignored here
        assert other.honoured | set(other.refused) <= known
    assert set(get_type_hints(Reasoning)) <= set(UNSUPPORTED_REASONING)
    assert set(get_type_hints(ResponseTextConfigParam)) <= {"format", *UNSUPPORTED_TEXT}
    assert set(get_type_hints(StreamOptions)) <= STREAM_OPTIONS | set(UNSUPPORTED_STREAM_OPTIONS)
    assert set(get_args(ResponseIncludable)) == set(INCLUDABLE)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
NAMES = ["role", "content", "type", "text", "format", "call_id", "name", "arguments", "output", "effort", "mode"]
VALUES = st.recursive(
    SCALARS | st.sampled_from(["user", "message", "function_call", "function", "json_schema", "input_text", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@given(
    body=st.dictionaries(st.sampled_from(sorted(RESPONSES.honoured | set(RESPONSES.refused))), VALUES, max_size=4),
    value=VALUES,
    allow_unknown=st.booleans(),
)
def test_a_body_is_a_request_or_refused(body: dict[str, Any], value: Any, allow_unknown: bool) -> None:
    for one in (body, value, {"input": "x"} | body, {"input": [value]}):
        try:
            assert isinstance(responses_request(one, allow_unknown=allow_unknown), ResponsesRequest)
        except InvalidRequest as error:
            assert str(error) and error.code


def test_a_prompt_that_is_too_long_names_the_input(llm: Llama) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode(llm.engine(), parse(llm, input="word " * MAX_SEQ_LEN).request)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")


def run(llm: Llama, request: ResponsesRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a stream, and the object of the same answer."""
    (submitted,) = submit(llm.engine(reuse_prefixes=False), request.request)
    writer = ResponseWriter(request, llm.tokenizer, "served")
    events = writer.begin()
    for increment in submitted:
        events += writer.add(increment)
    result = submitted.result()
    return events + writer.end(result), response_object(request, result, llm.tokenizer, "served")


def without_names(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs from one to the next."""
    kept = {key: value for key, value in response.items() if key not in ("id", "created_at", "completed_at")}
    items = [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in kept["output"]]
    return kept | {"output": items}


@pytest.mark.parametrize("logprobs", [False, True], ids=["plain", "logprobs"])
def test_a_text_has_openais_shape(llm: Llama, logprobs: bool) -> None:
    more: dict[str, Any] = {"include": [LOGPROBS], "top_logprobs": 2} if logprobs else {}
    request = parse(llm, metadata={"a": "b"}, user="me", instructions="", **more)
    events, found = run(llm, request)
    kinds = checked(events)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.delta" for _ in deltas),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert len(deltas) > 3 and "".join(event["delta"] for event in deltas) == PARIS
    last = events[-1]["response"]
    assert without_names(last) == without_names(found) and last["id"] == events[0]["response"]["id"]
    parsed = Response.model_validate(found, strict=True)
    assert parsed.output_text == PARIS and (parsed.status, parsed.model) == ("completed", "served")
    assert (found["metadata"], found["user"], found["temperature"], found["store"]) == ({"a": "b"}, "me", 0, False)
    n_prompt = len(encode(llm.engine(), request.request)[0])
    n_answer = len(llm.tokenizer.encode(PARIS, bos=False, eos=False))
    assert parsed.usage is not None and parsed.usage.input_tokens_details.cached_tokens == 0
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens) == (n_prompt, n_answer)
    assert parsed.usage.total_tokens == n_prompt + n_answer
    (item,) = found["output"]
    assert item["content"][0]["logprobs"] == [entry for event in deltas for entry in event["logprobs"]]
    if logprobs:
        assert b"".join(bytes(entry["bytes"]) for entry in item["content"][0]["logprobs"]).decode() == PARIS
        assert all(len(entry["top_logprobs"]) == 2 for event in deltas for entry in event["logprobs"])
        assert all(event["delta"] == "".join(one["token"] for one in event["logprobs"]) for event in deltas)
    else:
        assert item["content"][0]["logprobs"] == []


def test_an_answer_that_is_cut_is_incomplete(llm: Llama) -> None:
    events, found = run(llm, parse(llm, max_output_tokens=3))
    checked(events)
    assert events[-1]["type"] == "response.incomplete" and events[-1]["response"]["completed_at"] is None
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["output"][0]["status"] == "incomplete" and PARIS.startswith(found["output"][0]["content"][0]["text"])


def test_times_are_whole_seconds(llm: Llama) -> None:
    events, found = run(llm, parse(llm))
    responses = [event["response"] for event in events if "response" in event] + [found]
    assert {type(one["created_at"]) for one in responses} == {int}
    assert type(found["completed_at"]) is int and found["completed_at"] >= found["created_at"]


def pieces_of(text: str, size: int) -> list[Increment]:
    """A text in increments without tokens."""
    cuts = range(0, len(text), size)
    return [Increment(0, text[begin : begin + size], [], None, None, None, None) for begin in cuts]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_are_items_of_their_own(size: int, llm: Llama, tmp_path_factory: pytest.TempPathFactory) -> None:
    formatter = formatter_of(tmp_path_factory.mktemp("hermes"), HERMES)
    request = responses_request({"input": "x", "tools": FLAT}, formatter=formatter)
    calls = [('{"city": "Paris"}', "get_weather"), ("{}", "clock")]
    written = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for arguments, name in calls
    ]
    text = "I look.\n" + "\n".join(written)
    writer = ResponseWriter(request, llm.tokenizer, "m")
    events = writer.begin()
    for increment in pieces_of(text, size):
        events += writer.add(increment)
    events += writer.end(finished(text))
    kinds = checked(events)
    short = [kind.removeprefix("response.") for kind in dict.fromkeys(kinds)]
    assert short[2:] == [
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"),
        *("output_item.done", "function_call_arguments.delta", "function_call_arguments.done", "completed"),
    ]
    found = events[-1]["response"]
    Response.model_validate(found, strict=True)
    assert without_names(found) == without_names(response_object(request, finished(text), llm.tokenizer, "m"))
    message, *items = found["output"]
    assert message["content"][0]["text"] == "I look." and message["status"] == "completed"
    assert [(item["type"], item["status"]) for item in items] == [("function_call", "completed")] * 2
    assert [(item["arguments"], item["name"]) for item in items] == calls
    assert len({item["call_id"] for item in items}) == 2 and all(item["id"].startswith("fc_") for item in items)
    for index, item in enumerate(found["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added" and own[-1]["type"] == "response.output_item.done"
        assert own[-1]["item"] == item and own[0]["item"]["status"] == "in_progress"
        assert all(event["item_id"] == item["id"] for event in own[1:-1])
        if index:
            deltas = [event["delta"] for event in own if event["type"].endswith("arguments.delta")]
            assert "".join(deltas) == own[-2]["arguments"] == item["arguments"]
    outputs = [{"type": "function_call_output", "call_id": item["call_id"], "output": "fine"} for item in items]
    items = [{"role": "user", "content": "x"}, *found["output"], *outputs]
    dialog: Any = responses_request({"input": items, "tools": FLAT}, formatter=formatter).request.prompts[0]
    roles = [message["role"] for message in dialog]
    assert roles == ["user", "assistant", "tool", "tool"]


def test_a_call_that_is_cut_is_incomplete(llm: Llama) -> None:
    request = parse(llm, tools=FLAT)
    found = response_object(request, finished('{"name": "clock", "parameters": {"a', "length"), llm.tokenizer, "m")
    Response.model_validate(found, strict=True)
    (item,) = found["output"]
    assert (item["type"], item["arguments"], item["status"]) == ("function_call", '{"a', "incomplete")


def test_a_call_that_a_stop_string_cuts_is_incomplete(llm: Llama) -> None:
    """The answer has ended as it was asked to; its call has not."""
    request = parse(llm, tools=FLAT)
    for text, status in (('{"name": "clock", "parameters": {"a', "incomplete"), (CLOCK_CALL, "completed")):
        for size in (1, 1000):
            writer = ResponseWriter(request, llm.tokenizer, "m")
            events = writer.begin()
            for increment in pieces_of(text, size):
                events += writer.add(increment)
            events += writer.end(finished(text))
            assert checked(events)[-1] == "response.completed"
            (item,) = events[-1]["response"]["output"]
            assert (item["type"], item["status"]) == ("function_call", status)
            assert events[-2]["item"] == item


def test_an_answer_that_must_call_has_no_message(llm: Llama) -> None:
    request = parse(llm, tools=FLAT, tool_choice="required")
    for text in ("\n\n", "{", ""):
        found = response_object(request, finished(text, "length"), llm.tokenizer, "m")
        Response.model_validate(found, strict=True)
        assert (found["output"], found["status"]) == ([], "incomplete")
    (item,) = response_object(request, finished(f"\n{CLOCK_CALL}\n"), llm.tokenizer, "m")["output"]
    assert (item["type"], item["status"]) == ("function_call", "completed")


def test_log_probabilities_of_calls_are_in_no_text(llm: Llama, tmp_path_factory: pytest.TempPathFactory) -> None:
    formatter = formatter_of(tmp_path_factory.mktemp("hermes"), HERMES)
    request = responses_request({"input": "x", "tools": FLAT, "include": [LOGPROBS]}, formatter=formatter)
    text = 'I look.\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    tokens = llm.tokenizer.encode(text, bos=False, eos=False)
    answer = Answer(0, text, tokens, [-1.0] * len(tokens), finish_reason="stop")
    message, call = response_object(request, Result([1], [answer]), llm.tokenizer, "m")["output"]
    assert "".join(entry["token"] for entry in message["content"][0]["logprobs"]).rstrip("\n") == "I look."
    assert call["name"] == "clock"


def test_an_empty_answer_is_an_empty_text(llm: Llama) -> None:
    request = parse(llm)
    writer = ResponseWriter(request, llm.tokenizer, "m")
    checked([*writer.begin(), *writer.end(finished(""))])
    found = Response.model_validate(response_object(request, finished(""), llm.tokenizer, "m"), strict=True)
    assert found.output_text == "" and len(found.output) == 1


def test_an_answer_that_fails_ends_its_stream(llm: Llama) -> None:
    request = parse(llm)
    failures = [finished("Th", "error", "the logits are not finite"), finished("Th", "cancelled")]
    for result, message in zip(failures, ("not finite", "cancelled"), strict=True):
        writer = ResponseWriter(request, llm.tokenizer, "m")
        events = [*writer.begin(), *writer.add(pieces_of("Th", 2)[0]), *writer.end(result)]
        assert checked(events)[-1] == "response.failed"
        error = events[-1]["response"]["error"]
        assert error["code"] == "server_error" and message in error["message"]
        assert events[-1]["response"]["status"] == "failed"
    with pytest.raises(AnswerFailed, match="not finite"):
        response_object(request, failures[0], llm.tokenizer, "m")
    writer = ResponseWriter(request, llm.tokenizer, "m")
    assert checked([*writer.begin(), *writer.fail("the server stops")])[-1] == "response.failed"
