"""Our own server as a peer of its engine: `fastllama serve` in a process of its own, and clients in this one.

There are as many clients as requests at a time, each with one connection, which it keeps. `serve` streams the answers,
`serve-whole` gets each as one body.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, NamedTuple

import h11

from fastllama.benchmarks.child_process import ChildProcess
from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.peers.http_server import HOST
from fastllama.benchmarks.peers.worker import Serve
from fastllama.benchmarks.runners import ServedRun, Workload

SERVER = "fastllama.benchmarks.peers.http_server"
STREAMED = "serve"  # the peer's name
READ_BYTES = 65536
EVENT = b"data: "
DONE = b"[DONE]"


class Answer(NamedTuple):
    """An answer, and when the request was sent and each group of tokens came, in seconds of time.perf_counter."""

    tokens: list[int]
    logprobs: list[float]
    start: float
    times: list[float]


def build_server(spec: ModelSpec, request: dict[str, Any]) -> Serve:
    """A server that has the weights of `spec`, and clients for it."""
    server = ChildProcess(SERVER)  # it ends with this process
    port = server.ask({"model": spec.to_json()})["port"]
    return partial(serve, server, port, request["name"] == STREAMED)


def serve(server: ChildProcess, port: int, streams: bool, workload: Workload, with_logprobs: bool) -> ServedRun:
    """Greedy answers to all requests. The server's cache is empty at the beginning."""
    server.ask({})
    begin = time.perf_counter()
    answers = asyncio.run(_answers(port, streams, workload, with_logprobs))
    return ServedRun(
        tokens=[one.tokens for one in answers],
        starts=[one.start - begin for one in answers],
        times=[[moment - begin for moment in one.times] for one in answers],
        logprobs=[one.logprobs for one in answers] if with_logprobs else None,
        **server.ask({}),
    )


async def _answers(port: int, streams: bool, workload: Workload, with_logprobs: bool) -> list[Answer]:
    prompts, output_lens, max_concurrency = workload
    answers: dict[int, Answer] = {}
    places = iter(range(len(prompts)))

    async def answer_next() -> None:
        connection = await Connection.open(port)
        try:
            for place in places:
                body = {
                    "prompt": prompts[place],
                    "max_tokens": output_lens[place],
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": streams,
                    "return_token_ids": True,
                    "logprobs": 0 if with_logprobs else None,
                }
                answers[place] = await _answer(connection, body)
        finally:
            connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(max_concurrency, len(prompts))):
            group.create_task(answer_next())
    return [answers[place] for place in range(len(prompts))]


async def _answer(connection: "Connection", body: dict[str, Any]) -> Answer:
    answer = Answer([], [], time.perf_counter(), [])
    async for event in connection.post("/v1/completions", body):
        for choice in event["choices"]:
            answer.tokens.extend(choice["token_ids"])
            answer.logprobs.extend((choice["logprobs"] or {}).get("token_logprobs", []))
            if choice["token_ids"]:
                answer.times.append(time.perf_counter())
    return answer


class Connection:
    """A connection over HTTP/1.1, for one request after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(cls, port: int) -> "Connection":
        """To a port of this machine."""
        return cls(*await asyncio.open_connection(HOST, port))

    async def post(self, path: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        """The body of the answer, or its events as they come. Raises RuntimeError for a status other than 200."""
        data, is_stream, rest = json.dumps(body).encode(), False, b""
        headers = {"Host": HOST, "Content-Type": "application/json", "Content-Length": str(len(data))}
        for event in (h11.Request(method="POST", target=path, headers=list(headers.items())), h11.Data(data)):
            self._writer.write(self._http.send(event) or b"")
        self._http.send(h11.EndOfMessage())
        while not isinstance(event := await self._next_event(), h11.EndOfMessage):
            match event:
                case h11.Response(status_code=200):
                    is_stream = dict(event.headers)[b"content-type"].startswith(b"text/event-stream")
                case h11.Response():
                    raise RuntimeError(f"the server answered {event.status_code}")
                case h11.Data():
                    rest += event.data
                    while is_stream and b"\n\n" in rest:
                        line, _, rest = rest.partition(b"\n\n")
                        if not line.endswith(DONE):
                            yield json.loads(line.removeprefix(EVENT))
        if not is_stream:
            yield json.loads(rest)
        self._http.start_next_cycle()

    def close(self) -> None:
        """End it."""
        self._writer.close()

    async def _next_event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(READ_BYTES))
        return event
