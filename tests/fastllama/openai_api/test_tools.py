"""Tools in bodies: which are accepted, what reaches the template, and what an answer with calls looks like."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from openai.types.chat import ChatCompletion
from transformers import PreTrainedTokenizerFast

from fastllama import Llama, Result, builtin_checkpoint
from fastllama.chat_format import Formatter, NoFormat
from fastllama.engine import Answer
from fastllama.openai_api.answer_parts import PlainParser
from fastllama.openai_api.envelope import ServedModel
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.requests import ApiRequest, chat_request, completion_request, encode, submit
from fastllama.openai_api.responses import response
from tests.fastllama.openai_api.tool_models import (
    ASKED,
    CLOCK,
    NO_TOOLS,
    TEMPLATES,
    WEATHER,
    called,
    formatter_of,
    match,
)

PARIS = '{"city": "Paris"}'
CALL_ID = "call_0123456789abcdef01234567"
RESULT = {"role": "tool", "tool_call_id": CALL_ID, "content": '{"celsius": 21}'}
HISTORY = [ASKED, called((CALL_ID, "get_weather", PARIS)), RESULT]
NAMED = {"type": "function", "function": {"name": "clock"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.fixture(scope="module", params=TEMPLATES)
def formatter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Formatter:
    return formatter_of(tmp_path_factory.mktemp(request.param), TEMPLATES[request.param])


def parse(formatter: Formatter | None, **body: Any) -> ApiRequest:
    body = {"messages": [ASKED], "tools": [WEATHER, CLOCK]} | body
    return chat_request({name: value for name, value in body.items() if value is not ...}, formatter=formatter)


def refusal(formatter: Formatter | None, **body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(formatter, **body)
    return caught.value


def prompt_of(formatter: Formatter, request: ApiRequest) -> list[int]:
    assert not isinstance(formatter, NoFormat)
    return formatter.encode_dialog_prompt(cast(Any, request.prompts[0]), request.tools)


def written(formatter: Formatter, name: str, arguments: str) -> str:
    key = "parameters" if '"parameters": ' in TEMPLATES["llama3"] and _kind(formatter) == "llama3" else "arguments"
    call = f'{{"name": "{name}", "{key}": {arguments}}}'
    return {"hermes": f"<tool_call>{call}</tool_call>", "mistral": f"[TOOL_CALLS][{call}]", "llama3": call}[
        _kind(formatter)
    ]


def _kind(formatter: Formatter) -> str:
    assert not isinstance(formatter, NoFormat) and hasattr(formatter, "template")
    return next(name for name, source in TEMPLATES.items() if source == formatter.template.source)


def outcome(formatter: Formatter, request: ApiRequest, text: str) -> str:
    assert request.params.grammar is not None and not isinstance(formatter, NoFormat)
    return match(request.params.grammar, formatter.tokenizer, text)


def test_prompts_are_those_of_transformers(formatter: Formatter, tmp_path: Path) -> None:
    """Arguments are objects there, and a result has its function's name."""
    folder = tmp_path / "model"
    folder.mkdir()
    formatter_of(folder, TEMPLATES[_kind(formatter)])
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token=None
    )
    theirs.chat_template = TEMPLATES[_kind(formatter)]
    parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    clock = {"type": "function", "function": {"name": "clock", "parameters": parameters}}
    for messages in ([ASKED], HISTORY, [*HISTORY, {"role": "assistant", "content": "21 °C."}, ASKED]):
        request = parse(formatter, messages=messages)
        known = [dict(message) for message in cast(Any, request.prompts[0])]
        if len(messages) > 1:
            assert known[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"} and "content" not in known[1]
            assert (known[2]["role"], known[2]["name"]) == ("tool", "get_weather")
            assert known[2]["tool_call_id"] == known[1]["tool_calls"][0]["id"]
            assert (known[2]["tool_call_id"] == CALL_ID) == (_kind(formatter) != "mistral")
        for tools in (None, [WEATHER, clock]):
            expected = theirs.apply_chat_template(known, tools=tools, add_generation_prompt=True, return_dict=False)
            ours = request if tools else parse(formatter, messages=messages, tools=...)
            assert prompt_of(formatter, ours) == expected


@pytest.mark.parametrize("strict", [None, True], ids=["usual", "strict"])
@pytest.mark.parametrize(
    ("choice", "text", "weather", "clock"),
    [
        (..., "whole", "whole", "whole"),
        ("auto", "whole", "whole", "whole"),
        ("required", "wrong", "whole", "whole"),
        (NAMED, "wrong", "wrong", "whole"),
        (allowed("required", "get_weather"), "wrong", "whole", "wrong"),
        (allowed("auto", "get_weather"), "whole", "whole", "wrong"),
    ],
    ids=["default", "auto", "required", "named", "allowed-required", "allowed-auto"],
)
def test_a_choice_decides_what_may_be_called(
    formatter: Formatter, choice: Any, text: str, weather: str, clock: str, strict: bool | None
) -> None:
    tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": strict}}, CLOCK]
    request = parse(formatter, tool_choice=choice, tools=tools)
    assert outcome(formatter, request, "Hello.") == text
    assert outcome(formatter, request, written(formatter, "get_weather", PARIS)) == weather
    assert outcome(formatter, request, written(formatter, "get_weather", "{}")) == "wrong"
    assert outcome(formatter, request, written(formatter, "clock", "{}")) == clock
    assert request.tools is not None and len(request.tools) == 2  # all of them are in the prompt
    assert "strict" not in json.dumps(request.tools)


def test_white_space_comes_before_a_call_only_where_text_may(formatter: Formatter) -> None:
    for choice, expected in (("auto", "whole"), ("required", "wrong"), (NAMED, "wrong")):
        request = parse(formatter, tool_choice=choice)
        assert outcome(formatter, request, "\n " + written(formatter, "clock", "{}")) == expected


def test_no_calls_but_tools_in_the_prompt(formatter: Formatter) -> None:
    request = parse(formatter, tool_choice="none")
    assert request.params.grammar is None and request.new_parser is PlainParser
    assert prompt_of(formatter, request) == prompt_of(formatter, parse(formatter))
    schema = {"name": "x", "schema": {"type": "object"}}
    request = parse(formatter, tool_choice="none", response_format={"type": "json_schema", "json_schema": schema})
    assert outcome(formatter, request, '{"a": 1}') == "whole" and outcome(formatter, request, "Hello.") == "wrong"


def test_calls_one_at_a_time_where_they_are_not_parallel(formatter: Formatter) -> None:
    one, two = written(formatter, "clock", "{}"), written(formatter, "clock", "{}") * 2
    if _kind(formatter) == "mistral":
        call = '{"name": "clock", "arguments": {}}'
        two = f"[TOOL_CALLS] [{call}, {call}]"
    for parallel in (..., True, False):
        request = parse(formatter, tool_choice="required", parallel_tool_calls=parallel)
        several = "whole" if parallel is not False and _kind(formatter) != "llama3" else "wrong"
        assert outcome(formatter, request, one) == "whole" and outcome(formatter, request, two) == several


def test_an_answer_follows_a_schema_or_calls(formatter: Formatter) -> None:
    request = parse(formatter, response_format={"type": "json_object"})
    assert outcome(formatter, request, '{"celsius": 21}') == outcome(formatter, request, "{}") == "whole"
    assert outcome(formatter, request, written(formatter, "clock", "{}")) == "whole"
    assert outcome(formatter, request, "Hello.") == "wrong"


def test_bodies_without_tools_stay_as_they_are(formatter: Formatter) -> None:
    plain = parse(formatter, tools=...)
    neutral: list[dict[str, Any]] = [{}, {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"}]
    for more in [*neutral, {"parallel_tool_calls": False}]:
        assert parse(None, **{"tools": None, **more}) == plain
    assert plain.tools is None and plain.params.grammar is None
    assert completion_request({"prompt": "x", "tools": [], "tool_choice": "none", "parallel_tool_calls": True})


NAMING = """{% for message in messages %}{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}:
{{- ' ' + message.content + '\\n' }}{% endfor %}"""


def test_names_reach_templates_that_write_them(llm: Llama, tmp_path: Path) -> None:
    """Of a result, the name is that of the function that was called."""
    roles = ("system", "user", "assistant", "developer")
    named = [{"role": role, "content": "x", "name": f"{role}1"} for role in roles]
    plain = [
        {"role": role, "content": "x", "name": name} for role, name in zip(roles, (None, "", None, ""), strict=True)
    ]
    formatter = formatter_of(tmp_path, NAMING)
    assert not isinstance(formatter, NoFormat)
    text = formatter.tokenizer.decode(prompt_of(formatter, parse(formatter, messages=named, tools=...)))
    assert text == "system system1: x\nuser user1: x\nassistant assistant1: x\nsystem developer1: x\n"
    text = formatter.tokenizer.decode(prompt_of(formatter, parse(formatter, messages=plain, tools=...)))
    assert text == "system: x\nuser: x\nassistant: x\nsystem: x\n"
    with_names = prompt_of(llm.formatter, parse(llm.formatter, messages=named, tools=...))
    assert with_names == prompt_of(llm.formatter, parse(llm.formatter, messages=plain, tools=...))
    history = parse(llm.formatter, messages=HISTORY).prompts
    for name in ("get_weather", "another", None):
        assert parse(llm.formatter, messages=[*HISTORY[:2], RESULT | {"name": name}]).prompts == history


def test_a_call_without_arguments_may_have_an_empty_text(formatter: Formatter) -> None:
    empty, braces = (
        parse(formatter, messages=[ASKED, called((CALL_ID, "clock", text)), RESULT]).prompts for text in ("", "{}")
    )
    assert empty == braces


FUNCTION = WEATHER["function"]
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "tools", "must be a list"),
    ({"tools": [CLOCK] * 129}, "tools", "at most 128, got 129"),
    ({"tools": ["clock"]}, "tools[0]", "must be an object"),
    ({"tools": [{}]}, "tools[0].type", "has no type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "has no function"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "only functions are"),
    ({"tools": [{"type": "function", "function": []}]}, "tools[0].function", "must be an object"),
    ({"tools": [{**CLOCK, "x": 1}]}, "tools[0].x", "'x' is not a field of tools[0]"),
    ({"tools": [CLOCK, {"type": "function", "function": {}}]}, "tools[1].function.name", "has no name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters, digits"),
    ({"tools": [{"type": "function", "function": {"name": 'a"'}}]}, "tools[0].function.name", "letters, digits"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools[0].function.name", "1 to 64"),
    ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name", "must differ"),
    (
        {"tools": [{"type": "function", "function": {**FUNCTION, "description": 5}}]},
        "tools[0].function.description",
        "must be a text",
    ),
    (
        {"tools": [{"type": "function", "function": {**FUNCTION, "strict": "yes"}}]},
        "tools[0].function.strict",
        "must be true or false",
    ),
    (
        {"tools": [{"type": "function", "function": {**FUNCTION, "parameters": {"type": "string"}}}]},
        "tools[0].function.parameters",
        'of the type "object"',
    ),
    (
        {"tools": [CLOCK, {"type": "function", "function": {**FUNCTION, "parameters": {"properties": 5}}}]},
        "tools[1].function.parameters",
        "properties",
    ),
    ({"tool_choice": "any"}, "tool_choice", "none, auto, required"),
    ({"tool_choice": 5}, "tool_choice", "none, auto, required"),
    ({"tool_choice": {"type": "custom"}}, "tool_choice.type", "'custom' is not supported"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "one of the tools (get_weather, clock), got None"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "watch"}}},
        "tool_choice.function",
        "one of the tools (get_weather, clock), got 'watch'",
    ),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "has no allowed_tools"),
    ({"tool_choice": allowed("none", "clock")}, "tool_choice.allowed_tools.mode", "auto or required"),
    ({"tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "must be a list"),
    ({"tool_choice": allowed("auto", "x")}, "tool_choice.allowed_tools.tools[0].function", "one of the tools"),
    ({"tools": ..., "tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [], "tool_choice": NAMED}, "tool_choice.function", "one of the tools (none)"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "must be true or false"),
    ({"functions": [FUNCTION]}, "functions", "is not supported"),
    ({"function_call": {"name": "clock"}}, "function_call", "is not supported"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=[f"{param}-{text}" for _, param, text in BAD])
def test_wrong_tools_are_named(llm: Llama, body: dict[str, Any], param: str, message: str) -> None:
    error = refusal(llm.formatter, **body)
    assert error.param == param and message in str(error)


def test_a_strict_function_names_what_cannot_be_kept(formatter: Formatter) -> None:
    function = {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    error = refusal(formatter, tools=[CLOCK, {"type": "function", "function": function}])
    assert error.param == "tools[1].function.parameters" and '"not"' in str(error)
    del function["strict"]
    request = parse(formatter, tools=[CLOCK, {"type": "function", "function": function}])
    assert outcome(formatter, request, written(formatter, "f", '{"a": 1}')) == "whole"


def test_other_members_pass_where_unknown_fields_do(llm: Llama) -> None:
    tool = {**CLOCK, "x": 1, "function": {**CLOCK["function"], "y": 2}}
    body = {"messages": [{**ASKED, "z": 3}], "tools": [tool]}
    request = chat_request(body, formatter=llm.formatter, allow_unknown=True)
    plain = chat_request({"messages": [ASKED], "tools": [CLOCK]}, formatter=llm.formatter)
    assert (request.prompts, request.tools, request.params) == (plain.prompts, plain.tools, plain.params)


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([ASKED, {"role": "assistant", "tool_calls": "x"}], "messages[1].tool_calls", "must be a list"),
        ([ASKED, {"role": "assistant", "tool_calls": [5]}], "messages[1].tool_calls[0]", "type function"),
        ([ASKED, {"role": "assistant", "tool_calls": [{"type": "custom"}]}], "messages[1].tool_calls[0]", "function"),
        ([ASKED, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0].function", "has no function"),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"id": "x", "function": 5}]}],
            "messages[1].tool_calls[0].function",
            "must be an object",
        ),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            "messages[1].tool_calls[0].id",
            "has no id",
        ),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"id": 5, "function": {}}]}],
            "messages[1].tool_calls[0].id",
            "must be a text",
        ),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"id": "x", "function": {"arguments": "{}"}}]}],
            "messages[1].tool_calls[0].function.name",
            "must be a text",
        ),
        ([ASKED, called(("x", "f", '{"a": '))], "messages[1].tool_calls[0].function.arguments", "JSON text of an obj"),
        ([ASKED, called(("x", "f", "[]"))], "messages[1].tool_calls[0].function.arguments", "JSON text of an object"),
        (
            [ASKED, called(("x", "f", '{"a": ' * 201 + "1" + "}" * 201))],
            "messages[1].tool_calls[0].function.arguments",
            "JSON text",
        ),
        ([ASKED, called(("x", "f", "[" * 99999))], "messages[1].tool_calls[0].function.arguments", "JSON text"),
        ([{**called((CALL_ID, "f", "{}")), "role": "user"}], "messages[0].tool_calls", "is not supported"),
        ([{**ASKED, "tool_call_id": CALL_ID}], "messages[0].tool_call_id", "is not supported"),
        ([{**ASKED, "name": 5}], "messages[0].name", "must be a text, got 5"),
        ([*HISTORY[:2], RESULT | {"name": ["f"]}], "messages[2].name", "must be a text"),
        ([ASKED, RESULT], "messages[1].tool_call_id", "the id of a call in a message before it"),
        ([*HISTORY[:2], {**RESULT, "content": None}], "messages[2].content", "must be a text"),
        ([*HISTORY[:2], {**RESULT, "tool_call_id": [1]}], "messages[2].tool_call_id", "the id of a call"),
        ([ASKED, {"role": "assistant", "content": None}], "messages[1].content", "must be a text"),
        ([ASKED, {"role": "assistant", "content": "x", "function_call": {}}], "messages[1].function_call", "supported"),
        ([ASKED, {"role": "assistant", "content": "x", "refusal": "no"}], "messages[1].refusal", "not supported"),
    ],
    ids=str,
)
def test_wrong_calls_in_messages_are_named(llm: Llama, messages: Any, param: str, message: str) -> None:
    for options in ({}, {"allow_unknown": True}):
        with pytest.raises(InvalidRequest) as caught:
            chat_request({"messages": messages}, formatter=llm.formatter, **options)
        assert caught.value.param == param and message in str(caught.value)


def test_a_model_without_calls_refuses_tools_by_name(tmp_path: Path) -> None:
    for formatter in (None, formatter_of(tmp_path, NO_TOOLS)):
        error = refusal(formatter)
        assert (error.param, error.code) == ("tools", "unsupported_parameter")
        error = refusal(formatter, messages=HISTORY, tools=...)
        assert (error.param, error.code) == ("messages", "unsupported_parameter")


def test_llama_3s_format_gets_tools_in_the_system_message(llm: Llama) -> None:
    """Written by us, where no template does: calls and results as in Llama 3.1."""
    system = {"role": "system", "content": "Be brief."}
    two = called((CALL_ID, "get_weather", PARIS), ("other", "clock", "{}"), content="I look.")
    request = parse(llm.formatter, messages=[system, ASKED, two, RESULT])
    text = llm.tokenizer.decode(prompt_of(llm.formatter, request))
    head, *rest = text.split("<|start_header_id|>")[1:]
    assert head.startswith("system<|end_header_id|>\n\nBe brief.\n\n") and head.endswith("}}}<|eot_id|>")
    assert json.dumps(WEATHER) in head and '"clock"' in head and '"parameters": {"parameter_name": "value"}' in head
    turns = [
        ("user", ASKED["content"]),
        ("assistant", "I look."),
        ("assistant", '{"name": "get_weather", "parameters": {"city": "Paris"}}'),
        ("assistant", '{"name": "clock", "parameters": {}}'),
        ("ipython", RESULT["content"]),
    ]
    expected = [f"{role}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in turns]
    assert rest == [*expected, "assistant<|end_header_id|>\n\n"]
    (without,) = encode(llm.engine(), parse(llm.formatter, messages=HISTORY, tools=...))
    assert llm.tokenizer.decode(without).startswith("<|begin_of_text|><|start_header_id|>user")


def answered(llm: Llama, request: ApiRequest, answer: Answer) -> dict[str, Any]:
    body = response(request, [Result([1, 2, 3], [answer])], ServedModel("m", llm.tokenizer))
    ChatCompletion.model_validate(body, strict=True)
    choice: dict[str, Any] = body["choices"][0]
    return choice


CALL_TEXT = '{"name": "get_weather", "parameters": {"city": "Paris"}}'


def test_an_answer_with_a_call(llm: Llama) -> None:
    request = parse(llm.formatter)
    choice = answered(llm, request, Answer(0, CALL_TEXT, [5], finish_reason="stop"))
    (call,) = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_") and choice["finish_reason"] == "tool_calls"
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": PARIS}}
    assert choice["message"]["content"] is None
    choice = answered(llm, request, Answer(0, CALL_TEXT[:-5], [5], finish_reason="length"))
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Par'


def test_an_answer_without_a_call(llm: Llama) -> None:
    expected = {"role": "assistant", "content": "Hello.", "refusal": None}
    for choice in ("auto", "none"):
        answer = Answer(0, "Hello.", [5], finish_reason="stop")
        found = answered(llm, parse(llm.formatter, tool_choice=choice), answer)
        assert found["message"] == expected and found["finish_reason"] == "stop"
    answer = Answer(0, CALL_TEXT, [5], finish_reason="stop")
    found = answered(llm, parse(llm.formatter, tool_choice="none"), answer)
    assert found["message"]["content"] == CALL_TEXT and "tool_calls" not in found["message"]


def test_a_result_of_a_call_can_be_sent_back() -> None:
    llm = Llama.build(*builtin_checkpoint(), 1024, 2, device="cpu")
    request = parse(llm.formatter)
    message = answered(llm, request, Answer(0, CALL_TEXT, [5], finish_reason="stop"))["message"]
    (call,) = message["tool_calls"]
    reply = {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "21"}]}
    for tools in ([WEATHER], ...):
        again = parse(llm.formatter, messages=[ASKED, message, reply], tools=tools, max_tokens=3)
        (submitted,) = submit(llm.engine(), again)
        result = submitted.result()
        assert f"assistant<|end_header_id|>\n\n{CALL_TEXT}<|eot_id|>" in llm.tokenizer.decode(result.prompt_tokens)
        assert len(result.answer.tokens) <= 3
