"""Chunks of a stream, joined, are the answer in one body; their order is what OpenAI's clients expect."""

from typing import Any

import pytest

from fastllama import Llama, builtin_checkpoint
from fastllama.engine import Answer, Increment
from fastllama.openai_api.chunks import Chunk, new_writer
from fastllama.openai_api.envelope import ServedModel
from fastllama.openai_api.errors import AnswerFailed
from fastllama.openai_api.requests import chat_request, completion_request, submit
from fastllama.openai_api.responses import response
from tests.fastllama.openai_api.conftest import Answering, answer_of

PROMPT = "Once upon a time"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
BODIES: dict[str, dict[str, Any]] = {
    "completion": {"prompt": PROMPT, "max_tokens": 12, "temperature": 0},
    "several": {"prompt": [PROMPT, "The cat"], "n": 2, "max_tokens": 9, "seed": 3},
    "ids": {"prompt": [1, 5, 9], "max_tokens": 4, "echo": True, "temperature": 0},
    "echo": {"prompt": PROMPT, "max_tokens": 4, "echo": True, "logprobs": 2, "n": 2, "seed": 5},
    "scored": {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1},
    "no logprobs": {"prompt": PROMPT, "max_tokens": 0, "echo": True},
    "stop": {"prompt": PROMPT, "stop": [" was", "zzz"], "temperature": 0, "logprobs": 0, "max_tokens": 30},
    "stop at once": {"prompt": PROMPT, "stop": ",", "temperature": 0},
    "characters": {"prompt": "☃ é 日本", "max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 0},
    "chat": {"messages": FRANCE, "temperature": 0},
    "chat with logprobs": {"messages": FRANCE, "temperature": 0, "logprobs": True, "top_logprobs": 2},
    "chats": {"messages": FRANCE, "n": 3, "seed": 1, "max_tokens": 5, "temperature": 1.5},
    "chat with stop": {"messages": FRANCE, "temperature": 0, "stop": "Fra"},
    "no tokens": {"messages": FRANCE, "max_tokens": 0},
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {"a": {"enum": ["city"]}}}},
}
CLOCK["function"]["parameters"] |= {"required": ["a"], "additionalProperties": False}  # type: ignore[index]
CALLING: dict[str, Any] = {"messages": FRANCE, "temperature": 0, "tools": [CLOCK], "tool_choice": "required"}


def streamed(llm: Llama, body: dict[str, Any], *, at_once: bool = False, **options: bool) -> list[Chunk]:
    """All chunks of a body's stream, the numbers of tokens included. at_once: all is there when it is first read."""
    parse = chat_request if "messages" in body else completion_request
    more: dict[str, Any] = {} if parse is completion_request else {"formatter": llm.formatter}
    request = parse({**body, "stream": True, "stream_options": {"include_usage": True, **options}}, **more)
    engine = llm.engine(reuse_prefixes=False)
    submitted = submit(engine, request)
    if at_once:
        engine.run()
    writer = new_writer(request, submitted, ServedModel("served", llm.tokenizer))
    chunks = writer.begin()
    for number, one in enumerate(submitted):
        for increment in one.take() if at_once else one:
            chunks += writer.add(number, increment)
    return chunks + writer.end()


def joined(chunks: list[Chunk], is_chat: bool) -> list[dict[str, Any]]:
    """The choices of a stream as one body has them."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            found = choices.setdefault(
                part["index"], {"index": part["index"], "text": "", "logprobs": None, "finish_reason": None}
            )
            assert found["finish_reason"] is None, "nothing comes after the end of an answer"
            found["finish_reason"] = part["finish_reason"]
            found["text"] += part["delta"].get("content", "") if is_chat else part["text"]
            for name, values in (part["logprobs"] or {}).items():
                found["logprobs"] = found["logprobs"] or {}
                if values is None:
                    found["logprobs"][name] = None
                else:
                    found["logprobs"].setdefault(name, []).extend(values)
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("at_once", [False, True], ids=["token by token", "at once"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_joined_chunks_are_the_whole_answer(
    llm: Llama, answered: Answering, body: dict[str, Any], at_once: bool
) -> None:
    is_chat = "messages" in body
    whole, chunks = answered(**body), streamed(llm, body, at_once=at_once)
    expected = [
        {**choice, "text": choice.pop("message")["content"]} if is_chat else choice for choice in whole["choices"]
    ]
    for choice in expected:  # without tokens there is nothing to join
        if choice["logprobs"] == {"content": [], "refusal": None}:
            choice["logprobs"] = None
    assert joined(chunks, is_chat) == [{name: one[name] for name in joined(chunks, is_chat)[0]} for one in expected]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1


def test_a_chat_begins_with_the_role_and_ends_with_the_reason(llm: Llama) -> None:
    chunks = [chunk["choices"][0] for chunk in streamed(llm, BODIES["chat"])[:-1]]
    assert chunks[0]["delta"] == {"role": "assistant", "content": ""} and chunks[0]["finish_reason"] is None
    assert all(chunk["delta"].keys() == {"content"} and chunk["delta"]["content"] for chunk in chunks[1:-1])
    assert chunks[-1]["delta"] == {} and chunks[-1]["finish_reason"] == "stop"


def test_usage_comes_only_where_it_is_asked_for(llm: Llama) -> None:
    request = chat_request({"messages": FRANCE, "temperature": 0, "stream": True})
    submitted = submit(llm.engine(), request)
    writer = new_writer(request, submitted, ServedModel("served", llm.tokenizer))
    chunks = [chunk for increment in submitted[0] for chunk in writer.add(0, increment)]
    assert writer.end() == [] and not any("usage" in chunk for chunk in chunks)


def test_a_failed_answer_ends_the_stream(llm: Llama) -> None:
    request = completion_request({"prompt": "x", "stream": True})
    (submitted,) = submit(llm.engine(), request)
    submitted.partial.answers[0] = Answer(0, error="the logits are not finite")
    writer = new_writer(request, [submitted], ServedModel("served", llm.tokenizer))
    with pytest.raises(AnswerFailed, match="not finite"):
        writer.add(0, Increment(0, "", [], None, None, "error", None))
    submitted.cancel()


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_token_ids_are_those_of_the_whole_answer(llm: Llama, body: dict[str, Any]) -> None:
    body = {**body, "return_token_ids": True}
    request = (chat_request if "messages" in body else completion_request)(body)
    results = [one.result() for one in submit(llm.engine(reuse_prefixes=False), request)]
    whole, chunks = response(request, results, ServedModel("served", llm.tokenizer)), streamed(llm, body)
    ids: dict[int, list[int]] = {}
    prompts = [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        ids.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
        prompts += [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
    choices = whole["choices"]
    n_echoed_begin = 1 if request.params.echo and isinstance(request.prompts[0], str) else 0  # not in the text
    expected = [answer.tokens[n_echoed_begin:] for result in results for answer in result.answers]
    assert [choice["token_ids"] for choice in choices] == [ids[index] for index in sorted(ids)] == expected
    own = [whole["prompt_token_ids"]] if request.is_chat else [choice["prompt_token_ids"] for choice in choices]
    assert prompts == own and own[0] == results[0].prompt_tokens


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_every_chunk_may_have_the_numbers_of_tokens(llm: Llama, body: dict[str, Any]) -> None:
    counts = [chunk["usage"]["completion_tokens"] for chunk in streamed(llm, body, continuous_usage_stats=True)]
    assert counts == sorted(counts) and counts[0] >= 0
    assert counts[-1] == streamed(llm, body)[-1]["usage"]["completion_tokens"]


@pytest.fixture(scope="module")
def wide() -> Llama:
    """A context for tools."""
    return Llama.build(*builtin_checkpoint(), 512, 1, device="cpu")


@pytest.mark.parametrize(
    ("more", "reason", "arguments"),
    [
        ({}, "tool_calls", '{"a": "city"}'),
        ({"stop": ["city"]}, "stop", '{"a": "'),
        ({"stop": ["}"]}, "stop", '{"a": "city"'),
        ({"stop": ["a"]}, "stop", None),
        ({"stop": ["parameters"]}, "stop", None),
        ({"max_tokens": 1}, "length", None),
        ({"max_tokens": 4}, "length", None),
    ],
    ids=str,
)
def test_a_call_that_was_cut_is_not_told_as_one(
    wide: Llama, more: dict[str, Any], reason: str, arguments: str | None
) -> None:
    """Whole and streamed. An answer that must have a call has no text, wherever it is cut."""
    (choice,) = answer_of(wide, CALLING | more)["choices"]
    chunks = [chunk["choices"][0] for chunk in streamed(wide, CALLING | more) if chunk["choices"]]
    assert choice["finish_reason"] == chunks[-1]["finish_reason"] == reason
    assert choice["message"]["content"] is None and not any(chunk["delta"].get("content") for chunk in chunks)
    calls = choice["message"].get("tool_calls", [])
    pieces = [call["function"]["arguments"] for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    texts = ["".join(call["function"]["arguments"].split()) for call in calls]
    assert texts == ([] if arguments is None else ["".join(arguments.split())])
    assert "".join("".join(pieces).split()) == "".join(texts)
