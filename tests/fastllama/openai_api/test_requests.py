"""Bodies of requests: every field's translation, and every refusal."""

from typing import Any, get_type_hints

import pytest
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming as ChatNonStreaming,
)
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsStreaming as ChatStreaming,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as CompletionNonStreaming,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsStreaming as CompletionStreaming,
)

from fastllama import Llama, SamplingParams
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.known_fields import (
    CHATS,
    COMPLETIONS,
    STREAM_OPTIONS,
    UNSUPPORTED_STREAM_OPTIONS,
    WITHOUT_EFFECT,
    BodyFields,
)
from fastllama.openai_api.requests import ApiRequest, chat_request, completion_request, encode, submit
from tests.fastllama.openai_api.conftest import MAX_SEQ_LEN

HELLO = [{"role": "user", "content": "hello"}]
ALL_SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.8,
    "n": 2,
    "seed": 7,
    "stop": ["a", "b"],
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"5": 2.5},
    "top_k": 9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "ignore_eos": True,
    "min_tokens": 2,
    "stop_token_ids": [11, 12],
}


def parse(body: dict[str, Any], **options: Any) -> ApiRequest:
    return (chat_request if "messages" in body else completion_request)(body, **options)


def refusal(body: Any, **options: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(body, **options)
    return caught.value


@pytest.mark.parametrize("text", [{"prompt": "x"}, {"messages": HELLO}], ids=["completion", "chat"])
def test_every_sampling_field_is_translated(text: dict[str, Any]) -> None:
    request = parse({**text, **ALL_SAMPLING, "max_tokens": 9, "model": "name"})
    expected = {**ALL_SAMPLING, "stop": ("a", "b"), "logit_bias": {5: 2.5}, "stop_token_ids": (11, 12)}
    assert request.params == SamplingParams(max_gen_len=9, **expected)
    assert (request.model, request.stream) == ("name", False)


def test_defaults_are_openais() -> None:
    completion, chat = parse({"prompt": "x"}), parse({"messages": HELLO})
    assert completion.params == SamplingParams(temperature=1, top_p=1, max_gen_len=16)
    assert chat.params == SamplingParams(temperature=1, top_p=1, max_gen_len=None)
    assert completion.prompt_field == "prompt" and chat.prompt_field == "messages"
    nulls = dict.fromkeys((*ALL_SAMPLING, "max_tokens", "logprobs", "model", "stream", "tools", "user"))
    assert parse({"prompt": "x", **nulls}) == completion
    assert parse({"messages": HELLO, **nulls, "max_completion_tokens": None, "top_logprobs": None}) == chat


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ["x"]), ([1, 2], [[1, 2]]), (["x", "y"], ["x", "y"]), ([[1], [2, 3]], [[1], [2, 3]])],
    ids=str,
)
def test_a_completion_has_one_prompt_or_several(prompt: Any, prompts: Any) -> None:
    assert parse({"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("body", "logprobs", "echo"),
    [
        ({"prompt": "x", "logprobs": 0}, 0, False),
        ({"prompt": "x", "logprobs": 5, "echo": True}, 5, True),
        ({"messages": HELLO, "logprobs": True}, 0, False),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 20}, 20, False),
        ({"messages": HELLO, "logprobs": False}, None, False),
    ],
    ids=str,
)
def test_logprobs_of_both_apis(body: dict[str, Any], logprobs: int | None, echo: bool) -> None:
    params = parse(body).params
    assert (params.logprobs, params.echo) == (logprobs, echo)


def test_messages_may_come_in_parts_and_from_a_developer() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be good"}, {"role": "user", "content": parts, "name": None}]
    messages.append({"role": "assistant", "content": "ab", "tool_calls": [], "refusal": None})
    (dialog,) = parse({"messages": messages}).prompts
    roles = [("system", "be good"), ("user", "ab"), ("assistant", "ab")]
    assert dialog == [{"role": role, "content": content} for role, content in roles]


def test_a_limit_of_a_chat_has_two_names() -> None:
    for limits in ({"max_completion_tokens": 5}, {"max_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}):
        assert parse({"messages": HELLO, **limits}).params.max_gen_len == 5
    error = refusal({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": [6]})
    assert "give one of them" in str(error) and error.param == "max_tokens"


def test_a_stream_is_known_to_a_server() -> None:
    request = parse({"prompt": "x", "stream": True, "stream_options": {"include_usage": True}})
    assert request.stream and request.include_usage
    assert refusal({"prompt": "x", "stream_options": {"include_usage": True}}).param == "stream_options"
    assert refusal({"prompt": "x", "stream": True, "stream_options": True}).param == "stream_options"
    name = "continuous_usage_stats"
    neutral = {"include_usage": True, "include_obfuscation": False, name: False}
    assert parse({"prompt": "x", "stream": True, "stream_options": neutral}) == request
    assert parse({"prompt": "x", "stream": True, "stream_options": neutral | {name: True}}).continuous_usage
    assert not parse({"prompt": "x", "stream": True, "stream_options": {name: True}}).continuous_usage
    error = refusal(
        {"prompt": "x", "stream": True, "stream_options": {"include_obfuscation": True}}, allow_unknown=True
    )
    assert (error.param, error.code) == ("stream_options.include_obfuscation", "unsupported_parameter")
    unknown = {"prompt": "x", "stream": True, "stream_options": {"include_use": True}}
    error = refusal(unknown)
    assert error.param == "stream_options.include_use" and "did you mean include_usage?" in str(error)
    assert not parse(unknown, allow_unknown=True).include_usage
    error = refusal({"prompt": "x", "stream": True, "stream_options": {"include_usage": 1}})
    assert error.param == "stream_options.include_usage"


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_fields_without_effect_are_accepted(name: str) -> None:
    assert parse({"prompt": "x", name: "anything"}) == parse({"prompt": "x"})


APIS: list[tuple[BodyFields, dict[str, Any]]] = [(COMPLETIONS, {"prompt": "x"}), (CHATS, {"messages": HELLO})]


@pytest.mark.parametrize(
    ("kind", "body", "name"),
    [(kind, body, name) for kind, body in APIS for name in sorted(kind.refused)],
    ids=lambda value: value if isinstance(value, str) else "completion" if "prompt" in str(value) else "chat",
)
def test_unsupported_fields_are_refused_unless_they_ask_for_nothing(
    kind: BodyFields, body: dict[str, Any], name: str
) -> None:
    """Some are fields of the other API, which honours them."""

    def asked(value: Any) -> ApiRequest:
        parse_one = completion_request if kind is COMPLETIONS else chat_request
        return parse_one({**body, name: value}, allow_unknown=True)

    for neutral in kind.refused[name]:
        assert asked(neutral) == asked(None) == parse(body)
    with pytest.raises(InvalidRequest, match=f"{name} is not supported: (leave it out|use )") as caught:
        asked({"some": "thing"})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_what_one_api_honours_is_refused_in_the_other_with_a_hint() -> None:
    pairs = [("prompt", "messages"), ("max_output_tokens", "max_completion_tokens"), ("guided_json", "response_format")]
    for name, instead in pairs:
        assert f"use {instead} instead" in str(refusal({"messages": HELLO, name: "x"}))
    with pytest.raises(InvalidRequest, match="use prompt, or /v1/chat/completions instead"):
        completion_request({"prompt": "x", "messages": HELLO}, allow_unknown=True)


@pytest.mark.parametrize("name", ["cache_salt", "priority", "logits_processors", "vllm_xargs", "prompt_embeds"])
def test_fields_of_vllm_that_change_answers_are_refused(name: str) -> None:
    for _, body in APIS:
        error = refusal({**body, name: {"x": 1}}, allow_unknown=True)
        assert (error.param, error.code) == (name, "unsupported_parameter")
        assert parse({**body, "priority": 0, "spaces_between_special_tokens": True}, allow_unknown=True) == parse(body)


def test_special_tokens_are_added_to_texts_and_not_to_chats() -> None:
    """As vLLM's defaults say: a chat's template writes its own."""
    for (_, body), neutral in zip(APIS, (True, False), strict=True):
        assert parse({**body, "add_special_tokens": neutral}) == parse(body)
        assert refusal({**body, "add_special_tokens": not neutral}).param == "add_special_tokens"


def test_the_best_of_as_many_as_are_asked_for_are_all() -> None:
    for _, body in APIS:
        assert parse({**body, "n": 3, "best_of": 3}) == parse({**body, "n": 3})
        for wrong in ({"n": 3, "best_of": 4}, {"n": 3, "best_of": 1}, {"best_of": 2}, {"n": None, "best_of": 2}):
            assert refusal({**body, **wrong}).param == "best_of"


def test_values_that_ask_for_nothing() -> None:
    for _, body in APIS:
        assert parse({**body, "stop": ""}) == parse({**body, "stop": []}) == parse(body)
    chat = {"messages": HELLO}
    for more in ({"top_logprobs": 0}, {"top_logprobs": 0, "logprobs": False}, {"top_logprobs": None}):
        assert parse(chat | more) == parse(chat)


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_of", True), ("use_beam_search", 0), ("length_penalty", True), ("skip_special_tokens", 0.0)],
    ids=str,
)
def test_true_is_not_one(name: str, value: Any) -> None:
    assert refusal({"prompt": "x", name: value}).param == name
    assert parse({"prompt": "x", "length_penalty": 1, "best_of": 1.0}) == parse({"prompt": "x"})


def fields_of(kind: Any) -> set[str]:
    return set(get_type_hints(kind))


@pytest.mark.parametrize(
    ("kinds", "known"),
    [
        ((ChatStreaming, ChatNonStreaming), CHATS),
        ((CompletionStreaming, CompletionNonStreaming), COMPLETIONS),
    ],
    ids=["chat", "completion"],
)
def test_every_field_of_the_openai_package_is_sorted(kinds: tuple[Any, ...], known: BodyFields) -> None:
    names = set().union(*(fields_of(kind) for kind in kinds))
    assert len(names) > 15 and "stream" in names
    sorted_in = known.honoured | known.without_effect | set(known.refused)
    assert not names - sorted_in, "fields that would be unknown: honour, ignore or refuse each by name"


def test_every_stream_option_of_the_openai_package_is_sorted() -> None:
    assert fields_of(ChatCompletionStreamOptionsParam) <= STREAM_OPTIONS | set(UNSUPPORTED_STREAM_OPTIONS)


def test_unknown_fields_are_refused_with_a_hint_unless_they_are_allowed() -> None:
    body = {"prompt": "x", "max_token": 5}
    error = refusal(body)
    assert (error.param, error.code) == ("max_token", "unknown_parameter") and "did you mean max_tokens?" in str(error)
    assert "leave it out" in str(refusal({"prompt": "x", "colour": "red"}))
    assert parse(body, allow_unknown=True) == parse({"prompt": "x"})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", -1, "max_tokens must be a whole number of at least 0, got -1"),
        ("max_tokens", 1.5, "max_tokens must be"),
        ("max_tokens", True, "max_tokens must be"),
        ("temperature", -1, "temperature must be"),
        ("temperature", "hot", "temperature must be"),
        ("top_p", 1.5, "top_p must be a number from 0 to 1, got 1.5"),
        ("top_p", None, None),
        ("n", 0, "n must be a whole number from 1 to"),
        ("n", 129, "n must be a whole number from 1 to 128, got 129"),
        ("n", 8.0, "n must be a whole number from 1 to 128, got 8.0"),
        ("seed", 2**64, "a seed must be"),
        ("seed", "x", "a seed must be"),
        ("stop", [""], "stop must be texts that are not empty"),
        ("stop", 5, "stop must be a list"),
        ("presence_penalty", 3, "presence_penalty must be a number from -2 to 2"),
        ("frequency_penalty", "x", "frequency_penalty must be"),
        ("logit_bias", {"word": 1}, "a token id in logit_bias"),
        ("logit_bias", {"1": 101}, "a value in logit_bias must be a number from -100 to 100"),
        ("logit_bias", [1], "logit_bias must be a mapping"),
        ("top_k", -2, "top_k must be"),
        ("min_p", 2, "min_p must be a number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty must be"),
        ("ignore_eos", 1, "ignore_eos must be true or false"),
        ("min_tokens", -1, "min_tokens must be"),
        ("stop_token_ids", 7, "stop_token_ids must be a list"),
        ("stop_token_ids", ["x"], "a stop token id must be"),
        ("stream", "yes", "stream must be true or false"),
        ("model", 7, "model must be a text"),
    ],
    ids=str,
)
def test_wrong_values_are_named(field: str, value: Any, message: str | None) -> None:
    for body in ({"prompt": "x"}, {"messages": HELLO}):
        if message is None:
            parse({**body, field: value})
            continue
        error = refusal({**body, field: value})
        assert message in str(error) and "max_gen_len" not in str(error)
        assert (error.param, error.code) == (field, "invalid_value")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "x", "logprobs": True}, "logprobs", "invalid_value"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": "x", "echo": "yes"}, "echo", "invalid_value"),
        ({"prompt": "x", "max_tokens": 1, "min_tokens": 2}, "max_tokens", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": {"text": "x"}}, "prompt", "invalid_value"),
        ({"prompt": ["x", [1]]}, "prompt", "invalid_value"),
        ({"model": "m"}, "prompt", "missing_required_parameter"),
        ({"messages": HELLO, "logprobs": 1}, "logprobs", "invalid_value"),
        ({"messages": HELLO, "top_logprobs": 1}, "top_logprobs", "invalid_value"),
        ({"messages": HELLO, "top_logprobs": False}, "top_logprobs", "invalid_value"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": ["hello"]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [*HELLO, {"role": "user", "content": None}]}, "messages[1].content", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"messages": [{**HELLO[0], "name": ["Ann"]}]}, "messages[0].name", "invalid_value"),
    ],
    ids=str,
)
def test_wrong_bodies_are_named(body: dict[str, Any], param: str, code: str) -> None:
    error = refusal(body)
    assert (error.param, error.code) == (param, code)
    details = {"message": str(error), "type": "invalid_request_error", "param": param, "code": code}
    assert error.body() == {"error": details}


def test_a_body_must_be_an_object() -> None:
    bodies: list[Any] = [[], "x", None]
    for body in bodies:
        with pytest.raises(InvalidRequest, match="the body must be an object"):
            completion_request(body)


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        ({"prompt": [5] * MAX_SEQ_LEN}, f"the prompt has {MAX_SEQ_LEN} tokens, and {MAX_SEQ_LEN}", "context"),
        ({"prompt": [[5], [5] * 500]}, "prompt 1 has 500 tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "the prompt has", "context_length_exceeded"),
        ({"prompt": [5] * (MAX_SEQ_LEN + 2), "max_tokens": 0}, "the prompt has", "context_length_exceeded"),
        ({"prompt": [5, 10**6]}, "token 1 of the prompt must be a whole number from 0", "invalid_value"),
        ({"prompt": [[5], [True]]}, "token 0 of prompt 1 must be", "invalid_value"),
        ({"prompt": [[]]}, "the prompt is empty", "invalid_value"),
        ({"prompt": "x", "logit_bias": {"999999": 1}}, "logit_bias must have token ids", "invalid_value"),
        ({"prompt": "x", "stop_token_ids": [999999]}, "stop_token_ids must have token ids", "invalid_value"),
    ],
    ids=lambda value: f"{value!s:.40}",
)
def test_prompts_that_do_not_fit_the_model(llm: Llama, body: dict[str, Any], message: str, code: str) -> None:
    engine = llm.engine()
    with pytest.raises(InvalidRequest) as caught:
        submit(engine, parse(body))
    assert message in str(caught.value) and caught.value.code.startswith(code)
    assert engine.stats.running == engine.stats.waiting == 0


def test_a_request_is_submitted_whole_or_not_at_all(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine()
    submit_one = engine.submit

    def failing(prompt: Any, params: SamplingParams, **options: Any) -> Any:
        if len(prompt) > 1:
            raise ValueError("this request needs up to 9 positions of the cache")
        return submit_one(prompt, params, **options)

    monkeypatch.setattr(engine, "submit", failing)
    with pytest.raises(InvalidRequest, match="positions of the cache"):
        submit(engine, parse({"prompt": [[5], [6, 7]]}))
    assert engine.stats.running == engine.stats.waiting == 0


def test_a_full_context_can_be_scored(llm: Llama) -> None:
    ids = [5] * (MAX_SEQ_LEN + 1)
    assert encode(llm.engine(), parse({"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0})) == [ids]


@pytest.mark.parametrize("error", [MemoryError("as planned"), ValueError("as planned")])
def test_all_prompts_are_submitted_or_none(llm: Llama, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    engine = llm.engine()
    submitted: list[Any] = []
    plain = engine.submit

    def failing(*arguments: Any, **options: Any) -> Any:
        if submitted:
            raise error
        submitted.append(plain(*arguments, **options))
        return submitted[-1]

    monkeypatch.setattr(engine, "submit", failing)
    expected = InvalidRequest if isinstance(error, ValueError) else MemoryError
    with pytest.raises(expected, match="as planned"):
        submit(engine, completion_request({"prompt": ["a", "b"], "max_tokens": 4}))
    assert submitted[0].partial.answer.finish_reason == "cancelled" and engine.stats[:3] == (0, 0, 0)
