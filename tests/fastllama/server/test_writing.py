"""How bodies are read and answers written: large ones in threads, events on one line, and nothing lost by a failure."""

import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from fastllama import strict_json
from fastllama.engine.request import Numbered, merged
from fastllama.openai_api import chunks, requests
from fastllama.openai_api.errors import AnswerFailed
from fastllama.server import exchange, generation_routes, json_response, service
from fastllama.server.bodies import SMALL_BYTES
from fastllama.server.json_response import json_bytes
from fastllama.server.metrics import Metrics
from tests.support.running_server import RunningServer
from tests.support.timeouts import HANG_SECONDS

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
SMALL = {"prompt": "Once upon a time", "max_tokens": 2, "ignore_eos": True, "temperature": 0}
LOOP = "server"  # the name of the thread whose loop answers


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], set[str]]:
    """Lets a function of an object note in which threads it is called."""

    def note(owner: Any, name: str) -> set[str]:
        real, names = getattr(owner, name), set()

        def noting(*arguments: Any, **options: Any) -> Any:
            names.add(threading.current_thread().name.partition("_")[0])
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, noting)
        return names

    return note


@pytest.mark.parametrize(("size", "thread"), [(10, LOOP), (100_000, "compute")])
def test_large_bodies_are_parsed_in_a_thread(client: httpx.Client, noted: Any, size: int, thread: str) -> None:
    names = noted(strict_json, "loads")
    answer = client.post(COMPLETIONS, json=SMALL | {"some_new_field": [{}] * size})
    assert answer.status_code == 200 and names == {thread}
    # An error of a thread is the same one.
    wrong = b'{"a": ' + b"[" * size
    answer = client.post(COMPLETIONS, content=wrong, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(("logprobs", "thread"), [(0, LOOP), (20, "compute")])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
def test_large_answers_are_written_in_a_thread(
    client: httpx.Client, noted: Any, path: str, logprobs: int, thread: str
) -> None:
    sized = {"max_tokens": 100, "ignore_eos": True, "temperature": 0}
    body = {
        COMPLETIONS: sized | {"prompt": "Once upon a time", "logprobs": logprobs},
        CHAT: sized | {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": logprobs},
        RESPONSES: {"input": "Hi", "ignore_eos": True, "max_output_tokens": 100, "top_logprobs": logprobs}
        | {"include": ["message.output_text.logprobs"]},
    }[path]
    encoding, counting = noted(json_response, "json_bytes"), noted(Metrics, "note")
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert encoding == counting == {thread}


@pytest.mark.parametrize(("logprobs", "thread"), [(0, LOOP), (20, "compute")])
def test_large_events_are_written_in_a_thread(client: httpx.Client, noted: Any, logprobs: int, thread: str) -> None:
    """An echo comes at once."""
    encoding = noted(exchange, "json_bytes")
    body = {"prompt": "Once upon a time " * 20, "echo": True, "max_tokens": 0, "logprobs": logprobs, "stream": True}
    answer = client.post(COMPLETIONS, json=body)
    assert answer.status_code == 200 and thread in encoding


def test_tokens_are_written_in_a_thread(client: httpx.Client, noted: Any) -> None:
    encoding = noted(json_response, "json_bytes")
    assert client.post("/tokenize", json={"prompt": "x"}).json()["count"] == 2
    assert client.post("/detokenize", json={"tokens": [5]}).status_code == 200
    assert encoding == {"submit"}


def test_slow_grammars_do_not_hold_up_large_bodies(
    server: RunningServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All threads that submit are busy, and a body is still read: here as far as its error."""
    options: dict[str, Any] = {"json": {**SMALL, "user": "x" * SMALL_BYTES}, "timeout": None}  # not quick
    may_go_on = threading.Event()
    busy, real = threading.Semaphore(0), requests.submit

    def slow(*arguments: Any) -> Any:
        busy.release()
        assert may_go_on.wait(HANG_SECONDS)
        return real(*arguments)

    monkeypatch.setattr(service, "submit", slow)
    posts = [
        threading.Thread(target=httpx.post, args=(server.url + COMPLETIONS,), kwargs=options)
        for _ in range(service.SUBMITTING_THREADS)
    ]
    for post in posts:
        post.start()
    for _ in posts:
        assert busy.acquire(timeout=HANG_SECONDS)
    answer = client.post(COMPLETIONS, content="[" + "1," * 100_000, headers={"Content-Type": "application/json"})
    may_go_on.set()
    for post in posts:
        post.join(HANG_SECONDS)
    assert answer.status_code == 400


def test_an_event_is_one_line_for_every_reader(client: httpx.Client) -> None:
    text = "a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1d\x1e\r\n\u00e9\u3042"
    written = json_bytes({text: text})
    assert len(written.decode().splitlines()) == 1 and json.loads(written) == {text: text}
    assert "\u00e9\u3042".encode() in written  # as it is
    body = SMALL | {"prompt": text, "echo": True, "stream": True}
    with client.stream("POST", COMPLETIONS, json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines).startswith(text)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_came_before_a_failure_is_sent(client: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All increments come at once here, and the last one is a failure."""

    async def at_once(submitted: Any) -> AsyncIterator[list[Numbered]]:
        found = [one async for increments in merged(submitted) for one in increments]
        yield sorted(found, key=lambda one: one.increment.index == 1 and one.increment.finish_reason is not None)

    def failing(*arguments: Any) -> Any:
        writer = chunks.new_writer(*arguments)
        real = writer.add

        def add(number: int, increment: Any) -> Any:
            if number == 0 and increment.index == 1 and increment.finish_reason:
                raise AnswerFailed("no numbers")
            return real(number, increment)

        monkeypatch.setattr(writer, "add", add)
        return writer

    monkeypatch.setattr(generation_routes, "merged", at_once)
    monkeypatch.setattr(exchange, "new_writer", failing)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"n": 2, "temperature": 0, "max_tokens": 20, "stream": True}
    answer = client.post(path, json=body | ({"messages": messages} if path == CHAT else {"prompt": "The cat"}))
    events = [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]
    assert answer.status_code == 200 and events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "answer_failed"
    sent = [choice for event in events[:-2] for choice in json.loads(event)["choices"]]
    assert any(choice["finish_reason"] for choice in sent if choice["index"] == 0)
