"""Clients that send nothing, and clients that read nothing: neither holds up the others for good."""

import contextlib
import json
import logging
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from fastllama import Llama
from fastllama.server import run
from fastllama.server.connection import Connection
from fastllama.server.settings import ServerSettings
from tests.support.running_server import RunningServer, running_server
from tests.support.timeouts import HANG_SECONDS, wait_until

COMPLETIONS = "/v1/completions"
BUFFER_BYTES = 4096
# Its answer has more bytes than uvicorn and both sockets hold.
LARGE = {"prompt": "Once upon a time", "n": 6, "logprobs": 20, "max_tokens": 200, "ignore_eos": True, "temperature": 0}
PATIENT = ServerSettings(max_queue=2)
HASTY = ServerSettings(send_seconds=0.1)
IMPATIENT = ServerSettings(head_seconds=0.1)


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "POLL_SECONDS", 0.01)


def connect(server: RunningServer) -> socket.socket:
    """A connection with small buffers on both sides."""
    for listener in server.server.servers[0].sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    connection.settimeout(HANG_SECONDS)
    connection.connect(("127.0.0.1", server.port))
    return connection


def send(connection: socket.socket, **body: Any) -> None:
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def read_to_the_end(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(2**16):
            found += piece
    return found


def connections(server: RunningServer) -> list[Any]:
    return list(server.server.server_state.connections)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_reads_takes_no_place_in_the_queue(llm: Llama, stream: bool) -> None:
    with running_server(llm, PATIENT) as server, contextlib.closing(connect(server)) as unread:
        send(unread, **LARGE, stream=stream)
        wait_until(lambda: any(one.flow.write_paused for one in connections(server)))
        wait_until(lambda: server.service.n_open == 0)
        answer = httpx.post(server.url + COMPLETIONS, json={"prompt": "x", "n": 6, "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        wait_until(lambda: len(connections(server)) == 1)  # that of the answer that nobody reads


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_reads_ends(llm: Llama, stream: bool) -> None:
    with running_server(llm, HASTY) as server, contextlib.closing(connect(server)) as unread:
        send(unread, **LARGE, stream=stream)
        wait_until(lambda: any(one.flow.write_paused for one in connections(server)))
        wait_until(lambda: not connections(server) and not server.server.server_state.tasks)
        server.wait_until_idle()
        found = read_to_the_end(unread)
        assert found.startswith(b"HTTP/1.1 200") and not found.endswith(b"0\r\n\r\n")


def test_what_is_left_of_an_answer_after_its_end_is_not_kept_for_ever(llm: Llama) -> None:
    """The server has closed the connection, and its client does not read the rest."""
    with running_server(llm, HASTY) as server, contextlib.closing(connect(server)) as unread:
        send(unread, **LARGE)
        wait_until(lambda: any(one.flow.write_paused for one in connections(server)))
        for one in connections(server):
            one.loop.call_soon_threadsafe(one.transport.close)
        wait_until(lambda: not connections(server))


@pytest.mark.parametrize("begin", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: local"])
@pytest.mark.parametrize("after", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_connection_without_a_whole_head_is_closed(llm: Llama, begin: bytes, after: bytes) -> None:
    """The first request of a connection, and a later one."""
    with running_server(llm) as server, contextlib.closing(connect(server)) as silent:
        if after:
            silent.sendall(after)
            got = b""
            while not got.endswith(b"}"):
                got += silent.recv(4096)
            assert got.startswith(b"HTTP/1.1 200")
        server.server.config.settings = IMPATIENT
        if begin or not after:  # without either it is kept for as long as uvicorn is told
            silent.sendall(begin)
            assert read_to_the_end(silent) == b""


def test_a_slow_answer_is_no_reason_to_close(llm: Llama) -> None:
    """While the engine works, nobody has to send anything."""
    with running_server(llm) as server, contextlib.closing(connect(server)) as waiting:
        with server.paused():
            send(waiting, prompt="x", max_tokens=1)
            wait_until(lambda: server.service.n_open == 1)
            server.server.config.settings = IMPATIENT
            (one,) = connections(server)
            checks: list[float] = []

            def check_and_note(now: float) -> None:
                checks.append(now)
                Connection.check(one, now)

            one.check = check_and_note
            wait_until(lambda: bool(checks) and checks[-1] - checks[0] > 3 * IMPATIENT.head_seconds)
        assert waiting.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("signals", [1, 2])
def test_a_stream_that_is_cut_at_the_end_is_no_fault(
    llm: Llama, signals: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run, "CLOSE_SECONDS", 0.1)
    with running_server(llm, ServerSettings(drain_seconds=0)) as server, contextlib.closing(connect(server)) as unread:
        send(unread, **LARGE, stream=True)
        wait_until(lambda: any(one.flow.write_paused for one in connections(server)))
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)
        for number in range(signals):
            server.server.stop(at_once=number > 0)
        wait_until(lambda: not server.server.server_state.tasks)
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert caplog.messages == []


class Transport:
    """A transport that only has a size."""

    def __init__(self) -> None:
        self.size, self.is_open, self.is_aborted = 0, True, False

    def get_write_buffer_size(self) -> int:
        return self.size

    def is_closing(self) -> bool:
        return not self.is_open

    def close(self) -> None:
        self.is_open = False

    def abort(self) -> None:
        self.is_aborted = True


@pytest.fixture
def connection() -> Iterator[Any]:
    made = Connection.__new__(Connection)
    made.config = cast(Any, SimpleNamespace(settings=ServerSettings(send_seconds=60, head_seconds=60)))
    made.connections = set()
    made.transport, made.flow = cast(Any, Transport()), cast(Any, SimpleNamespace(write_paused=True))
    made._head_since, made._unsent, made._sent_at = None, 0, 0.0
    yield made


def test_a_client_that_reads_slowly_is_kept(connection: Any) -> None:
    for at, connection.transport.size in enumerate(range(100, 0, -1)):
        connection.check(at * 59.0)
    assert not connection.transport.is_aborted
    connection.check(99 * 59.0 + 61)
    assert connection.transport.is_aborted


def test_a_client_that_reads_as_much_as_is_written_is_kept(connection: Any) -> None:
    connection.transport.size = 100
    for at in range(10):
        connection.check(at * 59.0)
        connection.flow = SimpleNamespace(write_paused=False, resume_writing=lambda: None)
        connection.resume_writing()
        connection.flow = SimpleNamespace(write_paused=True)
    assert not connection.transport.is_aborted


def test_idle_connections_make_room(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "IDLE_CONNECTIONS", 0)
    settings = ServerSettings(max_connections=4)
    with running_server(llm, settings) as server, contextlib.ExitStack() as stack:
        silent = []
        for number in range(1, 21):
            silent.append(stack.enter_context(contextlib.closing(connect(server))))
            wait_until(lambda: len(connections(server)) == min(number, 4))  # noqa: B023 (called at once)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert [read_to_the_end(one) for one in silent[:17]] == [b""] * 17  # the oldest first


def test_requests_in_work_are_not_closed_for_new_connections(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "IDLE_CONNECTIONS", 0)
    with running_server(llm, ServerSettings(max_connections=2)) as server, contextlib.ExitStack() as stack:
        working = [stack.enter_context(contextlib.closing(connect(server))) for _ in range(2)]
        with server.paused():
            for one in working:
                send(one, prompt="x", max_tokens=1)
            wait_until(lambda: server.service.n_open == 2)
            with contextlib.closing(connect(server)) as late:
                assert read_to_the_end(late) == b""
        for one in working:
            assert one.recv(4096).startswith(b"HTTP/1.1 200")


def test_an_answer_that_is_being_sent_is_not_cut_for_new_connections(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was written as a whole, so its request is done for the server."""
    monkeypatch.setattr(run, "IDLE_CONNECTIONS", 0)
    with running_server(llm, ServerSettings(max_connections=2)) as server, contextlib.ExitStack() as stack:
        sending = stack.enter_context(contextlib.closing(connect(server)))
        send(sending, **LARGE)
        wait_until(lambda: any(one.flow.write_paused and one.is_idle for one in connections(server)))
        for _ in range(3):
            stack.enter_context(contextlib.closing(connect(server)))
        assert httpx.get(f"{server.url}/health").status_code == 200
        head, _, body = sending.recv(2**16).partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split()[0])
        while len(body) < size:
            piece = sending.recv(2**16)
            assert piece, "the answer was cut"
            body += piece
        assert len(json.loads(body)["choices"]) == LARGE["n"]


def test_the_limit_of_connections_is_below_that_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(90, 90)]
    monkeypatch.setattr("resource.getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda kind, limit: limits.append(limit))
    monkeypatch.setattr("os.listdir", lambda path: ["0"] * 10)
    assert run._free_descriptors() == 90 - 10 - run.SPARE_DESCRIPTORS
    limits.append((20, 4000))
    assert run._free_descriptors() == 1
    run.raise_descriptor_limit()
    assert limits[-1] == (4000, 4000)
