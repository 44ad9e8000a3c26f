"""The official client of OpenAI against the server: completions and chats, whole and in streams."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from fastllama import Llama, SamplingParams
from fastllama.server.settings import ServerSettings
from tests.support.running_server import MODEL, RunningServer, running_server
from tests.support.timeouts import wait_until

STORY = "Once upon a time"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
SEED = 5


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client
    server.wait_until_idle()


def engine_text(server: RunningServer, prompt: Any, **params: Any) -> str:
    """The engine's own answer."""
    return server.engine.submit(prompt, SamplingParams(**params)).result().answer.text


def n_aborted(server: RunningServer) -> float:
    """How many answers ended because their clients went away."""
    labels = {"model_name": MODEL, "finished_reason": "abort"}
    return server.service.metrics.registry.get_sample_value("vllm:request_success_total", labels) or 0.0


def test_lists_and_retrieves_the_model(client: OpenAI, server: RunningServer) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "fastllama") and model.created > 0
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("another")
    assert raised.value.code == "model_not_found" and raised.value.param == "model"


def test_completes(client: OpenAI, server: RunningServer) -> None:
    found = client.completions.create(model=MODEL, prompt=STORY, temperature=0, max_tokens=20)
    assert found.choices[0].text == engine_text(server, STORY, temperature=0, max_gen_len=20)
    assert found.choices[0].finish_reason == "length" and found.choices[0].logprobs is None
    assert found.object == "text_completion" and found.model == MODEL and found.system_fingerprint is not None
    n_prompt = len(server.engine.encode(STORY))
    assert found.usage is not None and found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (n_prompt, 20)
    assert found.usage.total_tokens == n_prompt + 20


def test_completes_several_prompts_with_several_answers(client: OpenAI, server: RunningServer) -> None:
    prompts = [STORY, "The dog"]
    found = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=SEED, max_tokens=8)
    texts = [choice.text for choice in found.choices]
    alone = [
        choice.text
        for prompt in prompts
        for choice in client.completions.create(model=MODEL, prompt=prompt, n=2, seed=SEED, max_tokens=8).choices
    ]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3] and texts == alone
    assert texts[0] != texts[1]  # two answers of one seed
    tokens = server.engine.encode(STORY)
    of_tokens = client.completions.create(model=MODEL, prompt=tokens, n=2, seed=SEED, max_tokens=8)
    assert [choice.text for choice in of_tokens.choices] == texts[:2]
    of_lists = client.completions.create(model=MODEL, prompt=[tokens, tokens], seed=SEED, max_tokens=8)
    assert [choice.text for choice in of_lists.choices] == [texts[0], texts[0]]


def test_completion_streams(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": [STORY, "The dog"],
        "n": 2,
        "seed": SEED,
        "max_tokens": 12,
        "logprobs": 1,
    }
    whole = client.completions.create(**asked)
    texts, tokens, reasons = [""] * 4, [[] for _ in range(4)], [None] * 4  # type: ignore[var-annotated]
    usages = []
    with client.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            usages.append(chunk.usage)
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                tokens[choice.index] += (choice.logprobs.tokens or []) if choice.logprobs else []
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices if choice.logprobs]
    assert whole.usage is not None and usages[-1] is not None and set(usages[:-1]) == {None}
    assert usages[-1].total_tokens == whole.usage.total_tokens


def test_echoes_with_logprobs(client: OpenAI) -> None:
    found = client.completions.create(model=MODEL, prompt=STORY, echo=True, logprobs=2, max_tokens=0)
    choice = found.choices[0]
    assert choice.text == STORY and choice.logprobs is not None and choice.finish_reason == "length"
    logprobs, tops, offsets = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, choice.logprobs.text_offset
    assert logprobs is not None and tops is not None and offsets is not None and choice.logprobs.tokens is not None
    # The token that begins every text comes before them, so that the first one has a log-probability, too.
    assert all(one < 0 for one in logprobs)
    assert all(max(top.values()) >= one for top, one in zip(tops, logprobs, strict=True))
    assert "".join(choice.logprobs.tokens) == STORY and offsets[0] == 0 and offsets == sorted(offsets)
    assert found.usage is not None and found.usage.completion_tokens == 0


def test_stops_before_a_stop_string(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=STORY, temperature=0, max_tokens=40).choices[0].text
    stop = whole[20:24]
    for stops in (stop, ["never there", stop]):
        found = client.completions.create(model=MODEL, prompt=STORY, temperature=0, max_tokens=40, stop=stops)
        assert found.choices[0].text == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"


def test_chats(client: OpenAI, server: RunningServer) -> None:
    found = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    message = found.choices[0].message
    assert message.role == "assistant" and message.content == engine_text(server, QUESTION, temperature=0)
    assert found.choices[0].finish_reason == "stop" and message.tool_calls is None and message.refusal is None
    again = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=2)
    assert again.choices[0].finish_reason == "length" and again.usage is not None
    assert again.usage.completion_tokens == 2 and again.system_fingerprint == found.system_fingerprint


def test_chat_streams_with_usage(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "n": 2, "seed": SEED, "max_completion_tokens": 30}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({one.id for one in chunks}) == 1
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert choices[0].delta.role == "assistant" and not any(one.delta.role for one in choices[1:])
        assert "".join(one.delta.content or "" for one in choices) == whole.choices[index].message.content
        assert [one.finish_reason for one in choices if one.finish_reason] == [whole.choices[index].finish_reason]
    assert not chunks[-1].choices and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_chat_logprobs_have_bytes(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content is not None
    for one in whole.logprobs.content:
        assert one.bytes is not None and bytes(one.bytes).decode() == one.token and len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token and one.top_logprobs[0].logprob == one.logprob
    assert "".join(one.token for one in whole.logprobs.content) == whole.message.content
    with client.chat.completions.create(**asked, stream=True) as stream:
        streamed = [choice.logprobs for chunk in stream for choice in chunk.choices if choice.logprobs]
    pieces = [one for logprobs in streamed for one in logprobs.content or []]
    assert [one.token for one in pieces] == [one.token for one in whole.logprobs.content]
    assert [one.logprob for one in pieces] == pytest.approx([one.logprob for one in whole.logprobs.content], abs=1e-4)


def test_the_stream_helper_accumulates(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0}
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == client.chat.completions.create(**asked).choices[0].message.content


def test_logit_bias_and_extra_fields_change_the_answer(client: OpenAI, server: RunningServer) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": STORY, "temperature": 0, "max_tokens": 4}
    token = server.engine.submit(STORY, SamplingParams(temperature=0, max_gen_len=1)).result().answer.tokens[0]
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, logit_bias={str(token): -100}).choices[0].text != plain
    greedy = [
        {"top_k": 1},
        {"min_p": 1.0},
        {"top_k": 1, "repetition_penalty": 1.0, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": []},
    ]
    for extra in greedy:  # the most likely token only, at any temperature
        drawn = client.completions.create(**asked | {"temperature": 2}, seed=SEED, extra_body=extra)
        assert drawn.choices[0].text == plain
    assert client.completions.create(**asked, extra_body={"somebody_elses": 1}).choices[0].text == plain


def test_bad_requests(client: OpenAI) -> None:
    cases: list[tuple[dict[str, Any], str, str | None]] = [
        ({"temperature": -1}, "temperature", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens", None),
        ({"stop": [""]}, "stop", None),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "messages", "context_length_exceeded"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio", "unsupported_parameter"),
    ]
    for extra, param, code in cases:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **extra})
        assert raised.value.param == param and raised.value.type == "invalid_request_error"
        assert code is None or raised.value.code == code
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="another", messages=QUESTION, stream=True)
    assert missing.value.code == "model_not_found"


def test_a_full_queue_is_a_rate_limit(llm: Llama) -> None:
    async def two_requests(server: RunningServer) -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            first = asyncio.create_task(client.completions.create(model=MODEL, prompt=STORY, n=4, max_tokens=2))
            await asyncio.to_thread(wait_until, lambda: server.service.n_open == 4)
            with pytest.raises(openai.RateLimitError) as raised:
                await client.completions.create(model=MODEL, prompt=STORY)
            assert raised.value.code == "queue_full" and int(raised.value.response.headers["retry-after"]) >= 1
            paused.close()
            assert len((await first).choices) == 4
            assert (await client.completions.create(model=MODEL, prompt=STORY)).choices

    with running_server(llm, ServerSettings(max_queue=0)) as server, ExitStack() as paused:
        paused.enter_context(server.paused())
        asyncio.run(two_requests(server))


def test_keys_and_a_stopping_server(llm: Llama) -> None:
    with running_server(llm, ServerSettings(api_keys=("secret", "other"))) as server:
        address: dict[str, Any] = {"base_url": f"{server.url}/v1", "max_retries": 0}
        with OpenAI(api_key="wrong", **address) as client, pytest.raises(openai.AuthenticationError) as raised:
            client.models.list()
        assert raised.value.code == "invalid_api_key"
        with OpenAI(api_key="other", **address) as client:
            assert [model.id for model in client.models.list()] == [MODEL]
            server.service.is_stopping = True
            with pytest.raises(openai.InternalServerError) as stopping:
                client.completions.create(model=MODEL, prompt=STORY)
            assert stopping.value.status_code == 503 and stopping.value.code == "stopping"


def test_a_closed_stream_frees_its_row(client: OpenAI, server: RunningServer) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": STORY, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    before = n_aborted(server)
    with server.paused(after_steps=6):
        with client.completions.create(**asked, n=3, stream=True) as stream:
            assert next(iter(stream)).choices and server.engine.stats.running == 3
        wait_until(lambda: not server.service.n_open)
    server.wait_until_idle()
    wait_until(lambda: n_aborted(server) == before + 3)
    assert client.completions.create(**asked | {"max_tokens": 1}).choices


def test_async_clients_at_once(server: RunningServer) -> None:
    prompts = [f"{name} went to the" for name in ("Lily", "Tom", "Ben", "Sara", "Max", "Mia", "Sam")]

    async def ask(client: AsyncOpenAI, number: int, stream: bool) -> str:
        asked: dict[str, Any] = {"model": MODEL, "prompt": prompts[number], "seed": number, "max_tokens": 10 + number}
        if not stream:
            return str((await client.completions.create(**asked)).choices[0].text)
        async with await client.completions.create(**asked, stream=True) as chunks:
            return "".join([chunk.choices[0].text async for chunk in chunks])

    async def ask_all() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            numbers = range(len(prompts))
            alone = [await ask(client, number, stream=False) for number in numbers]
            together = await asyncio.gather(*(ask(client, number, stream=number % 2 == 0) for number in numbers))
            return alone, list(together)

    alone, together = asyncio.run(ask_all())
    assert together == alone
    server.wait_until_idle()


def test_cancelled_tasks_free_their_rows(server: RunningServer) -> None:
    def n_submitted() -> int:
        stats = server.engine.stats
        return stats.running + stats.waiting

    async def cancel_all() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "n": 2}
            tasks = [asyncio.create_task(client.chat.completions.create(**asked)) for _ in range(3)]
            await asyncio.to_thread(wait_until, lambda: n_submitted() == 6)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(wait_until, lambda: not server.service.n_open)

    before = n_aborted(server)
    with server.paused(after_steps=4):
        asyncio.run(cancel_all())
    server.wait_until_idle()
    wait_until(lambda: n_aborted(server) == before + 6)
