"""The chat page and a fake of the API that it calls, on a port of their own: answers are what a test has written down.

with FakeChatServer() as server:
    server.replies.append(Reply(["Hel", HOLD, "lo"]))  # the next answer; it holds after "Hel"
    page.goto(server.url)
    ...
    server.go_on()                                     # lets it go on
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Hi"}]
"""

import json
import select
import socket
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from fastllama.server.page import read_page

MODEL = "llama-test"
PROMPT_TOKENS, CACHED_TOKENS = 7, 3  # what every answer's usage says
WAIT_SECONDS = 60.0  # for what a test has forgotten to let happen
POLL_SECONDS = 0.01  # between two looks whether the client is still there


@dataclass(frozen=True)
class Hold:
    """A place in an answer where it waits until the test lets it go on, or the client leaves."""


HOLD = Hold()


@dataclass
class Reply:
    """One answer of /v1/chat/completions.

    parts: in their order, texts of chunks (each counts as a token), places to hold, and objects that are sent as they
    are. is_cut: the connection breaks after the parts.
    """

    parts: Sequence[str | Hold | Mapping[str, Any]] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    is_cut: bool = False


def error_reply(status: int, message: str, **headers: str) -> Reply:
    """A request that is refused with a message."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply([{"error": {"message": message, "type": "error", "param": None, "code": None}}], status, named)


class FakeChatServer(ThreadingHTTPServer):
    """Serves the page at any path that ends with "/", and the API below it.

    bodies, authorizations: of the requests for answers. paths: of all requests. aborted: one permit for each client
    that left during an answer. key: the API key that requests need, if any.
    """

    daemon_threads = True

    def __init__(self, key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.key = key
        self.replies: deque[Reply] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.arrived = threading.Semaphore(0)
        self.aborted = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": POLL_SECONDS})

    def go_on(self) -> None:
        """Let the answer that holds, or the next one to hold, go on."""
        self.permits.release()

    def wait_for_request(self) -> None:
        """Return when the next chat's body has come."""
        assert self.arrived.acquire(timeout=WAIT_SECONDS), "no request has come"

    def wait_for_abort(self) -> None:
        """Return when a client has left during an answer."""
        assert self.aborted.acquire(timeout=WAIT_SECONDS), "no client has left during an answer"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeChatServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path.endswith("/"):
            page, headers = read_page()
            self._send(200, page, headers)
        elif self._is_allowed():
            self._send_json(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        self.server.bodies.append(body)
        self.server.arrived.release()
        reply = self.server.replies.popleft()
        if reply.status == 200:
            self._stream(reply)
        else:
            self._send_json(reply.status, reply.parts[0], reply.headers)

    def _is_allowed(self) -> bool:
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._send_json(401, {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}})
        return False

    def _send_json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, reply: Reply) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._send_events(reply)
        except ConnectionError:
            self.close_connection = True
            self.server.aborted.release()

    def _send_events(self, reply: Reply) -> None:
        self._event(_chunk({"role": "assistant", "content": ""}))
        for part in reply.parts:
            if isinstance(part, Hold):
                self._hold()
            else:
                self._event(_chunk({"content": part}) if isinstance(part, str) else part)
        if reply.is_cut:
            self.close_connection = True  # without the chunk that ends the body
            return
        self._event(_chunk({}, reply.finish_reason))
        tokens = sum(isinstance(part, str) for part in reply.parts)
        self._event({"choices": [], "usage": _usage(tokens)})
        self._write(b"data: [DONE]\n\n")
        self._write(b"")

    def _event(self, data: Mapping[str, Any]) -> None:
        self._write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())

    def _write(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _hold(self) -> None:
        while not self.server.permits.acquire(timeout=POLL_SECONDS):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError("the client has left")


def _chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None}


def _usage(completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": completion_tokens,
        "total_tokens": PROMPT_TOKENS + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
    }
