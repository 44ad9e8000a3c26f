"""OpenAI's client, for answers with a form: JSON schemas, tools, and the Responses API, whole and streamed."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jsonschema_rs
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam
from openai.types.responses import FunctionToolParam, ResponseFunctionToolCall
from pydantic import BaseModel, StringConstraints

from fastllama import Llama, builtin_checkpoint
from tests.support.running_server import MODEL, RunningServer, running_server

QUESTION = "What is the capital of France?"
PARIS = "The capital of France is Paris."
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city.", "parameters": SCHEMA},
}
FLAT_WEATHER: FunctionToolParam = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
ENOUGH = 400  # tokens, for any text of these schemas


class Place(BaseModel):
    """What the built-in model can always write in time."""

    name: Annotated[str, StringConstraints(max_length=8)]
    kind: Literal["city", "country"]
    is_large: bool


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(Llama.build(*builtin_checkpoint(), 1024, 4, device="cpu")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("seed", range(3))
def test_a_chat_is_parsed_into_a_pydantic_model(client: OpenAI, seed: int) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Place, seed=seed, max_tokens=ENOUGH
    )
    assert isinstance(answer.choices[0].message.parsed, Place) and answer.choices[0].finish_reason == "stop"


def test_a_json_object(client: OpenAI, llm: Llama) -> None:
    likely = {str(token): 8 for text in ('"', "}", '"}') for token in llm.tokenizer.encode(text, bos=False, eos=False)}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        response_format={"type": "json_object"},
        max_tokens=ENOUGH,
        seed=1,
        logit_bias=likely,  # so that it ends soon
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop" and isinstance(json.loads(choice.message.content or ""), dict)


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_tool_is_called(client: OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[WEATHER], tool_choice=choice, max_tokens=ENOUGH, seed=2
    )
    (found,) = answer.choices
    assert found.finish_reason == "tool_calls" and found.message.content is None
    assert found.message.tool_calls is not None
    (call,) = found.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather" and call.id.startswith("call_")
    jsonschema_rs.validate(SCHEMA, json.loads(call.function.arguments))


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_streamed_call_has_its_id_first(client: OpenAI, choice: Any) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[WEATHER], tool_choice=choice, max_tokens=ENOUGH, seed=2, stream=True
    )
    deltas = [choice for chunk in stream for choice in chunk.choices]
    assert deltas[0].delta.role == "assistant" and deltas[-1].finish_reason == "tool_calls"
    assert not any(one.delta.content for one in deltas)
    calls = [call for one in deltas for call in one.delta.tool_calls or []]
    first, *others = calls
    assert first.id and first.function is not None and first.function.name == "get_weather"
    assert not first.function.arguments and len(others) > 1 and not any(one.id for one in others)
    arguments = "".join(one.function.arguments or "" for one in others if one.function is not None)
    jsonschema_rs.validate(SCHEMA, json.loads(arguments))


def test_a_result_of_a_call_is_taken_back(client: OpenAI) -> None:
    call: Any = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}],
    }
    result: Any = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    messages = [*MESSAGES, call, result]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], max_tokens=4, temperature=0
    )
    without = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[WEATHER], max_tokens=1)
    assert answer.usage is not None and without.usage is not None
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens and answer.usage.completion_tokens == 4


def test_auto_leaves_a_text_free(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[WEATHER], tool_choice="auto", temperature=0, max_tokens=12
    )
    assert answer.choices[0].message.content and answer.choices[0].message.tool_calls is None


def test_a_wrong_schema_is_named(client: OpenAI) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=wrong)
    assert error.value.param == "response_format.json_schema.schema"


def test_a_response(client: OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
    assert response.output_text == PARIS and response.status == "completed" and response.error is None
    assert response.usage is not None and response.usage.output_tokens == 8
    cut = client.responses.create(model=MODEL, input=MESSAGES, temperature=0, max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens" and PARIS.startswith(cut.output_text)


def test_the_events_of_a_response(client: OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input=QUESTION, temperature=0, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * deltas,
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == PARIS
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == PARIS


def test_a_response_is_parsed_into_a_pydantic_model(client: OpenAI) -> None:
    response = client.responses.parse(model=MODEL, input=QUESTION, text_format=Place, max_output_tokens=ENOUGH)
    assert isinstance(response.output_parsed, Place)


def test_a_response_with_a_call(client: OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input=QUESTION, tools=[FLAT_WEATHER], tool_choice="required", max_output_tokens=ENOUGH
    )
    (call,) = response.output
    assert isinstance(call, ResponseFunctionToolCall) and call.name == "get_weather"
    jsonschema_rs.validate(SCHEMA, json.loads(call.arguments))


def test_the_events_of_a_call(client: OpenAI) -> None:
    events = list(
        client.responses.create(
            model=MODEL,
            input=QUESTION,
            tools=[FLAT_WEATHER],
            tool_choice="required",
            max_output_tokens=ENOUGH,
            stream=True,
        )
    )
    arguments = "".join(one.delta for one in events if one.type == "response.function_call_arguments.delta")
    jsonschema_rs.validate(SCHEMA, json.loads(arguments))
    (done,) = (one for one in events if one.type == "response.function_call_arguments.done")
    assert done.arguments == arguments and events[-1].type == "response.completed"
    (call,) = events[-1].response.output
    assert isinstance(call, ResponseFunctionToolCall) and call.arguments == arguments


def test_nothing_is_stored(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=MODEL, input=QUESTION, previous_response_id="resp_1")
    assert error.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
