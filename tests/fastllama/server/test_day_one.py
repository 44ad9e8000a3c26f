"""What servers are known to get wrong: each of these was a bug of a well-known one."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fastllama import Llama
from fastllama.openai_api import requests
from fastllama.server import service
from fastllama.server.settings import ServerSettings
from tests.support.running_server import RunningServer, running_server
from tests.support.timeouts import HANG_SECONDS, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
PROMPT = "Once upon a time"
ENDLESS = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    """A stream's chunks, and "[DONE]"."""
    answer = client.post(path, json=body | {"stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    pieces = answer.text.split("\n\n")
    assert pieces.pop() == "" and all(piece.startswith("data: ") for piece in pieces)
    found = [piece.removeprefix("data: ") for piece in pieces]
    assert found.pop() == "[DONE]"
    return [json.loads(one) for one in found]


def text_of(chunks: list[Any]) -> str:
    return "".join(
        choice.get("text", "") or choice.get("delta", {}).get("content", "")
        for chunk in chunks
        for choice in chunk["choices"]
    )


@pytest.mark.parametrize("stop", [["is"], [" Fr", "zz"], ["nce is P"], ["The capital of France is Paris. And more"]])
def test_a_stop_string_over_several_chunks_never_shows(client: httpx.Client, stop: list[str]) -> None:
    body = {"messages": FRANCE, "temperature": 0, "stop": stop}
    whole = post(client, CHAT, **body)["choices"][0]["message"]["content"]
    assert whole == PARIS.partition(next((s for s in stop if s in PARIS), "\0"))[0]
    assert text_of(events(client, CHAT, **body)) == whole


def test_characters_are_never_split(client: httpx.Client, llm: Llama) -> None:
    """A token that is a part of a character is forced by its bias."""
    snowman = llm.tokenizer.encode("☃", bos=False, eos=False)
    assert len(snowman) > 1
    first = {str(snowman[0]): 100}
    chunks = events(client, COMPLETIONS, prompt=PROMPT, logit_bias=first, max_tokens=3, temperature=0)
    assert text_of(chunks) == "\ufffd" * 3
    chunks = events(client, COMPLETIONS, prompt=["☃☃", "é"], echo=True, max_tokens=0)
    assert text_of(chunks) == "☃☃é"


def test_a_prompt_has_one_begin_of_text(client: httpx.Client, llm: Llama) -> None:
    begin = llm.tokenizer.bos_id
    tokens = post(client, "/tokenize", messages=FRANCE)["tokens"]
    assert tokens.count(begin) == 1 and tokens == llm.formatter.encode_dialog_prompt(FRANCE)  # type: ignore[arg-type]
    assert post(client, CHAT, messages=FRANCE, max_tokens=1)["usage"]["prompt_tokens"] == len(tokens)
    tokens = post(client, "/tokenize", prompt=PROMPT)["tokens"]
    assert tokens.count(begin) == 1
    assert post(client, COMPLETIONS, prompt=PROMPT, max_tokens=1)["usage"]["prompt_tokens"] == len(tokens)
    without = post(client, "/tokenize", prompt=PROMPT, add_special_tokens=False)
    assert without["tokens"] == tokens[1:] and without["count"] == len(tokens) - 1
    assert post(client, "/detokenize", tokens=without["tokens"]) == {"prompt": PROMPT}


def test_role_first_usage_last(client: httpx.Client) -> None:
    chunks = events(client, CHAT, messages=FRANCE, temperature=0, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_stream_of_false_is_no_stream(client: httpx.Client) -> None:
    for stream in (False, None):
        assert post(client, CHAT, messages=FRANCE, temperature=0, stream=stream)["object"] == "chat.completion"


def test_answers_of_one_seed_differ_and_repeat(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "n": 3, "seed": 11, "temperature": 1.5, "max_tokens": 12}
    texts = [choice["text"] for choice in post(client, COMPLETIONS, **body)["choices"]]
    assert len(set(texts)) == 3
    assert [choice["text"] for choice in post(client, COMPLETIONS, **body)["choices"]] == texts


def test_a_seed_gives_the_same_answer_in_any_company(server: RunningServer, client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "seed": 5, "temperature": 1.5, "max_tokens": 24}
    alone = post(client, COMPLETIONS, **body)["choices"][0]["text"]

    async def in_company() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=HANG_SECONDS) as many:
            others = [body | {"seed": seed, "prompt": f"{PROMPT} {seed}"} for seed in range(6)]
            answers = await asyncio.gather(*(many.post(COMPLETIONS, json=one) for one in [*others, body, body]))
        return [answer.json()["choices"][0]["text"] for answer in answers]

    texts = asyncio.run(in_company())
    assert texts[-2:] == [alone, alone] and len(set(texts)) == 7


def test_usage_counts_tokens_of_the_answer_only(client: httpx.Client) -> None:
    plain = post(client, COMPLETIONS, prompt=PROMPT, max_tokens=5, temperature=0)["usage"]
    echoed = post(client, COMPLETIONS, prompt=PROMPT, max_tokens=5, temperature=0, echo=True)["usage"]
    assert plain["completion_tokens"] == echoed["completion_tokens"] == 5
    assert plain["prompt_tokens"] == echoed["prompt_tokens"]
    stopped = post(client, CHAT, messages=FRANCE, temperature=0, stop=" is", logprobs=True)
    assert stopped["usage"]["completion_tokens"] == len(stopped["choices"][0]["logprobs"]["content"])
    assert stopped["usage"]["total_tokens"] == stopped["usage"]["prompt_tokens"] + stopped["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_answered_with_the_numbers(client: httpx.Client, stream: bool) -> None:
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": "time " * 400}], "stream": stream})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert "256" in error["message"] and any(int(word) > 400 for word in error["message"].split() if word.isdecimal())


def test_a_servers_own_limit_of_prompts(llm: Llama) -> None:
    with running_server(llm, ServerSettings(max_prompt_tokens=8)) as server:
        fits = httpx.post(f"{server.url}{COMPLETIONS}", json={"prompt": PROMPT, "max_tokens": 1})
        answer = httpx.post(f"{server.url}{COMPLETIONS}", json={"prompt": f"{PROMPT} {PROMPT}", "max_tokens": 1})
    assert fits.status_code == 200
    assert answer.status_code == 400 and "at most 8" in answer.json()["error"]["message"]


def wait_until_free(server: RunningServer) -> None:
    """Until no answer runs or waits, as the engine's own thread sees it."""

    async def free() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            while (stats := server.engine.stats).running or stats.waiting or server.service.n_open:
                await asyncio.sleep(0.01)

    asyncio.run(free())
    assert server.engine.stats.used_pages == 0


def aborted(server: RunningServer) -> float:
    """How many answers ended before their time."""
    return (
        server.service.metrics.registry.get_sample_value(
            "vllm:request_success_total", {"model_name": "served", "finished_reason": "abort"}
        )
        or 0.0
    )


@pytest.fixture
def few_steps(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """The engine runs a few steps, and more for each release."""
    allowed = threading.Semaphore(4)
    engine, step = server.engine, server.engine.step

    def step_if_allowed() -> bool:
        allowed.acquire()
        return step()

    monkeypatch.setattr(engine, "step", step_if_allowed)
    yield allowed
    allowed.release(1000)


def post_raw(server: RunningServer, **body: Any) -> socket.socket:
    """A connection that has sent a completion's body."""
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), HANG_SECONDS)
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 6])  # of 4 rows: some answers wait
def test_a_client_that_goes_away_frees_its_rows(
    server: RunningServer, few_steps: threading.Semaphore, stream: bool, n: int
) -> None:
    before = aborted(server)
    with contextlib.closing(post_raw(server, **ENDLESS, stream=stream, n=n)) as connection:
        if stream:
            assert connection.recv(1024).startswith(b"HTTP/1.1 200")
        while server.service.n_open < n or not server.engine.stats.running:
            pass
    while server.service.n_open:
        pass
    few_steps.release(1000)
    wait_until_free(server)
    wait_until(lambda: aborted(server) == before + n)


def test_a_client_that_goes_away_while_its_prompt_is_encoded(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that submits goes on after its request was dropped: what it submits is cancelled."""
    encoding, may_go_on = threading.Event(), threading.Event()
    real = requests.submit

    def slow(*arguments: Any) -> Any:
        encoding.set()
        assert may_go_on.wait(HANG_SECONDS)
        return real(*arguments)

    monkeypatch.setattr(service, "submit", slow)
    with contextlib.closing(post_raw(server, **ENDLESS)):
        assert encoding.wait(HANG_SECONDS)
    while server.service.n_open:
        pass
    may_go_on.set()
    wait_until_free(server)


def test_a_request_that_breaks_a_step_fails_alone(
    server: RunningServer, client: httpx.Client, llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40}, {"prompt": "zebra", "max_tokens": 5}
    alone = post(client, COMPLETIONS, **good)["choices"][0]["text"]
    tokens, hidden = llm.tokenizer.encode("zebra", bos=True, eos=False)[:-1], llm.model.hidden

    def breaking(batch: Any) -> Any:
        given = batch.tokens.tolist()
        if any(given[at : at + len(tokens)] == tokens for at in range(len(given))):
            raise ArithmeticError("this prompt breaks the step")
        return hidden(batch)

    monkeypatch.setattr(llm.model, "hidden", breaking)

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=HANG_SECONDS) as many:
            bodies = [good, bad, bad | {"stream": True}, good]
            return list(await asyncio.gather(*(many.post(COMPLETIONS, json=body) for body in bodies)))

    first, broken, broken_stream, last = asyncio.run(together())
    for answer in (first, last):
        assert answer.json()["choices"][0]["text"] == alone
    for answer in (broken, broken_stream):
        error = answer.json()["error"]
        assert answer.status_code == 500 and error["code"] == "answer_failed"
        assert "this prompt breaks the step" in error["message"]
    wait_until_free(server)
    assert post(client, COMPLETIONS, **good)["choices"][0]["text"] == alone


def test_too_many_answers_are_asked_to_come_back(llm: Llama) -> None:
    with (
        running_server(llm, ServerSettings(max_queue=2)) as server,
        httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client,
    ):
        never = client.post(COMPLETIONS, json={"prompt": PROMPT, "n": 7})
        assert never.status_code == 400 and "split it" in never.json()["error"]["message"]
        with server.paused(), contextlib.closing(post_raw(server, **ENDLESS, n=6)):  # all rows and the queue
            wait_until(lambda: server.service.n_open == 6)
            full = client.post(COMPLETIONS, json={"prompt": PROMPT})
            assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
            assert full.json()["error"]["code"] == "queue_full"
        wait_until_free(server)
        assert client.post(COMPLETIONS, json={"prompt": PROMPT}).status_code == 200


def test_requests_in_work_are_limited(llm: Llama) -> None:
    with (
        running_server(llm, ServerSettings(max_connections=1)) as server,
        socket.create_connection(("127.0.0.1", server.port), HANG_SECONDS) as slow,
        httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client,
    ):
        slow.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n".encode())
        slow.sendall(b"Content-Type: application/json\r\n\r\n")
        while (answer := client.get("/v1/models")).status_code == 200:
            pass
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
        slow.sendall(b"false")
        assert slow.recv(1024).startswith(b"HTTP/1.1 400")
        while (answer := client.get("/v1/models")).status_code == 429:
            pass
        assert answer.status_code == 200


def test_a_known_field_that_is_not_honoured_is_refused(client: httpx.Client) -> None:
    answer = client.post(CHAT, json={"messages": FRANCE, "audio": {"voice": "alloy"}})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "audio"
    assert post(client, CHAT, messages=FRANCE, temperature=0, some_new_field={"a": 1})["choices"]


def test_another_model_is_not_found(client: httpx.Client) -> None:
    for answer in (client.post(CHAT, json={"messages": FRANCE, "model": "gpt-9"}), client.get("/v1/models/gpt-9")):
        error = answer.json()["error"]
        assert answer.status_code == 404 and error["code"] == "model_not_found" and "'served'" in error["message"]
    assert client.get("/v1/models/served").json()["id"] == client.get("/v1/models").json()["data"][0]["id"] == "served"
