"""Bodies, headers and connections that no client means: errors in OpenAI's shape, and an engine that goes on.

Every test ends with a good request, whose answer is what it was before, and with nothing left in the engine.
"""

import contextlib
import errno
import http.client
import json
import logging
import socket
import struct
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama import Llama, builtin_checkpoint
from fastllama.openai_api.known_fields import CHATS as CHAT_FIELDS
from fastllama.openai_api.known_fields import COMPLETIONS as COMPLETION_FIELDS
from fastllama.openai_api.known_fields import RESPONSES as RESPONSES_FIELDS
from fastllama.server.settings import ServerSettings
from tests.support.running_server import HOST, RunningServer, running_server
from tests.support.timeouts import HANG_SECONDS

MAX_SEQ_LEN = 48  # so that answers are short
MAX_BODY = 400_000
KEY = "secret"
COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
PATHS = (COMPLETIONS, CHATS, RESPONSES, "/tokenize", "/detokenize")
MESSAGES = [{"role": "user", "content": "Hello"}]
GOOD: dict[str, Any] = {"prompt": "Once upon a time", "seed": 3, "max_tokens": 6}
FUNCTION: dict[str, Any] = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOL: dict[str, Any] = {"type": "function", **FUNCTION}  # as /v1/responses writes it
SCHEMA = {"name": "s", "schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}}
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (COMPLETIONS, GOOD | {"logprobs": 1, "n": 2, "stop": ["x"], "logit_bias": {"5": 1.0}}),
    (COMPLETIONS, GOOD | {"stream": True, "stream_options": {"include_usage": True}, "echo": True}),
    (CHATS, {"messages": MESSAGES, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}),
    (CHATS, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "stream": True}),
    (CHATS, {"messages": MESSAGES, "max_tokens": 5, "response_format": {"type": "json_schema", "json_schema": SCHEMA}}),
    (CHATS, {"messages": MESSAGES, "max_tokens": 5, "tools": [{"type": "function", "function": FUNCTION}]}),
    (RESPONSES, {"input": "Hello", "max_output_tokens": 5, "tools": [TOOL], "tool_choice": "auto"}),
    (RESPONSES, {"input": "Hello", "max_output_tokens": 5, "tools": [TOOL], "stream": True}),
    (RESPONSES, {"input": MESSAGES, "max_output_tokens": 5, "text": {"format": {"type": "json_schema", **SCHEMA}}}),
    ("/tokenize", {"prompt": "a text", "add_special_tokens": False}),
    ("/tokenize", {"messages": MESSAGES}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
)
REFUSED = {400, 401, 404, 405, 408, 413, 415, 422, 429, 431}
FIELDS = sorted(
    {name for kind in (COMPLETION_FIELDS, CHAT_FIELDS, RESPONSES_FIELDS) for name in (*kind.honoured, *kind.refused)}
)

numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**400, -0.0, 1e308, 5e-324, 0.5, 1.5, 3.0]),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),  # Python's JSON writes them, and reads them
)
texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "\0", "\ud800", "a\udfff", "\U0001f600" * 50, "<|begin_of_text|>", "{{ x }}", "é" * 500, "-1"]
    ),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(FIELDS), texts), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    llm = Llama.build(*builtin_checkpoint(), MAX_SEQ_LEN, 4, device="cpu")
    with running_server(llm, ServerSettings(api_keys=(KEY,), max_body_bytes=MAX_BODY, max_queue=12)) as running:
        yield running


@pytest.fixture(autouse=True)
def goes_on(server: RunningServer, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The good request has the same answer before and after, nothing is left, and no fault was logged."""

    def answer() -> Any:
        status, content = post(server, COMPLETIONS, json.dumps(GOOD).encode())
        assert status == 200
        return json.loads(content)["choices"]

    before = answer()
    yield
    server.wait_until_idle()
    assert answer() == before
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@contextlib.contextmanager
def connected(server: RunningServer) -> Iterator[socket.socket]:
    with socket.create_connection((HOST, server.port), HANG_SECONDS) as connection:
        yield connection


def head(method: str, path: str, *headers: bytes, key: str = KEY) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: test", f"Authorization: Bearer {key}".encode(), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def read_response(connection: socket.socket, method: str = "POST") -> tuple[int, bytes]:
    """The status and the body of an answer."""
    with contextlib.closing(http.client.HTTPResponse(connection, method=method)) as response:
        response.begin()
        return response.status, response.read()


def post(server: RunningServer, path: str, body: bytes, *headers: bytes) -> tuple[int, bytes]:
    """The answer to a body, with these headers or the right ones."""
    headers = headers or (b"Content-Type: application/json", b"Content-Length: %d" % len(body))
    with connected(server) as connection:
        with contextlib.suppress(ConnectionError):  # the server need not read a body that is too large
            connection.sendall(head("POST", path, *headers, b"Connection: close") + body)
        return read_response(connection)


def check(status: int, content: bytes) -> None:
    """Every answer is whole, or an error in OpenAI's shape that is the client's fault."""
    if status == 200:
        if content.startswith(b"event: "):
            assert b"event: response.failed" not in content
        elif content.startswith(b"data: "):
            assert content.endswith(b"data: [DONE]\n\n") and b'"server_error"' not in content
        else:
            json.loads(content)
        return
    assert status in REFUSED, (status, content)
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]


def many(strategy: st.SearchStrategy[Any], n: int, run: Callable[[Any], None]) -> None:
    """Run with so many drawn values."""
    settings(max_examples=n)(given(strategy)(run))()


def test_any_json(server: RunningServer) -> None:
    def run(drawn: tuple[str, Any]) -> None:
        check(*post(server, drawn[0], json.dumps(drawn[1]).encode()))

    many(st.tuples(st.sampled_from(PATHS), values), 150, run)


def test_fields_of_another_kind(server: RunningServer) -> None:
    """Bodies that would be right, if one to three of their fields did not have other values."""

    def run(drawn: tuple[tuple[str, dict[str, Any]], dict[str, Any]]) -> None:
        (path, body), changes = drawn
        check(*post(server, path, json.dumps(body | changes).encode()))

    changes = st.dictionaries(st.sampled_from([*FIELDS, "tokens"]), values, min_size=1, max_size=3)
    many(st.tuples(st.sampled_from(BODIES), changes), 300, run)


def test_messages_of_another_kind(server: RunningServer) -> None:
    roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "", None, 3])
    members = st.dictionaries(
        st.sampled_from(["name", "tool_calls", "tool_call_id", "refusal", "x"]), values, max_size=2
    )
    parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", 1]), "text": values}))
    messages = st.builds(
        lambda role, content, more: {"role": role, "content": content, **more}, roles, st.one_of(values, parts), members
    )

    def run(drawn: list[dict[str, Any]]) -> None:
        check(*post(server, CHATS, json.dumps({"messages": drawn, "max_tokens": 2}).encode()))

    many(st.lists(messages, max_size=4), 150, run)


def test_objects_with_another_member(server: RunningServer) -> None:
    """Tools, choices and formats with a member that is not known, or of another kind: some are repeated in answers."""
    tools: dict[str, Any] = {"tools": [TOOL]}
    bodies: list[tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]] = [
        (TOOL, lambda one: {"tools": [one]}),
        (TOOL["parameters"], lambda one: {"tools": [TOOL | {"parameters": one}], "tool_choice": "none"}),
        ({"type": "function", "name": "f"}, lambda one: tools | {"tool_choice": one}),
        ({"type": "text"}, lambda one: {"text": {"format": one}}),
        ({"type": "json_schema", **SCHEMA}, lambda one: {"text": {"format": one}}),
        ({"format": {"type": "text"}}, lambda one: {"text": one}),
    ]

    def run(drawn: tuple[Any, str, Any, bool]) -> None:
        (known, body_with), name, value, stream = drawn
        body = {"input": "Hello", "max_output_tokens": 2, "stream": stream, **body_with({**known, name: value})}
        check(*post(server, RESPONSES, json.dumps(body).encode()))

    names = st.sampled_from(["x", "type", "name", "parameters", "schema", "strict", "description", "format"])
    many(st.tuples(st.sampled_from(bodies), names, values, st.booleans()), 150, run)
    for (known, body_with), number in product(bodies, ("1e999", "-Infinity", "NaN")):
        body = json.dumps({"input": "x", **body_with({**known, "x": "NUMBER"})}).replace('"NUMBER"', number)
        status, content = post(server, RESPONSES, body.encode())
        check(status, content)
        assert status == 400 and f"{number} is not a finite number" in content.decode()


@pytest.mark.parametrize("size", [0, 2**17], ids=["small", "large"])
def test_every_depth_of_a_body(server: RunningServer, size: int) -> None:
    """There is none that can be read, and not be repeated in an answer or an error. size: of white space in the body.

    Large bodies are read elsewhere, with another depth of the stack.
    """
    bodies = [
        (
            RESPONSES,
            '{"input": "x", "max_output_tokens": 1, "text": {"format": {"type": "text", "x": %s}}}',
            {200, 400},
        ),
        (CHATS, '{"messages": [{"role": "user", "content": "x", "x": %s}], "max_tokens": 1}', {200, 400}),
        (COMPLETIONS, '{"prompt": %s}', {400}),
        (COMPLETIONS, '{"prompt": "x", "logit_bias": %s}', {400}),
    ]
    for path, text, expected in bodies:
        statuses = set[int]()
        for depth in (1, 150, *range(910, 1000)):
            status, content = post(server, path, (text % ("[" * depth + "]" * depth) + " " * size).encode())
            check(status, content)
            statuses.add(status)
        assert statuses == expected


def test_changed_bytes(server: RunningServer) -> None:
    """Bodies that were cut, or in which bytes were replaced: broken JSON, broken UTF-8, keys that are there twice."""

    def run(drawn: tuple[tuple[str, dict[str, Any]], int, bytes, int]) -> None:
        (path, body), at, new, n_replaced = drawn
        text = json.dumps(body).encode()
        at %= len(text)
        check(*post(server, path, text[:at] + new + text[at + n_replaced :]))

    pieces = st.one_of(
        st.binary(max_size=3),
        st.sampled_from(
            [b"\xed\xa0\x80", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"1e999", b"NaN", b"-", b'"', b"}"]
        ),
        st.sampled_from([b'{"n": 1, "n": 2}', b"[" * 300, b"//", b"\r\n"]),
    )
    many(st.tuples(st.sampled_from(BODIES), st.integers(0, 200), pieces, st.integers(0, 200)), 200, run)


@pytest.mark.parametrize("path", PATHS)
def test_large_and_deep_bodies(server: RunningServer, path: str) -> None:
    long = MAX_BODY // 2 - 1000
    texts = {"/detokenize": "[%s]", "/tokenize": '{"prompt": %s}', RESPONSES: '{"max_output_tokens": 1, "input": %s}'}
    text = texts.get(path, '{"max_tokens": 1, "prompt": %s}')
    bodies = [
        b"[" * long,
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        (b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        (text % f"[{','.join(['1'] * long)}]").encode(),
        (text % f'"{"a" * long}"').encode(),
        (text % f'"{"é" * (long // 2)}"').encode(),
        (text % ("9" * 5000)).encode(),
        ("{" + ",".join(f'"key{number}": {number}' for number in range(10_000)) + "}").encode(),
        b'{"prompt": "a", "prompt": "b", "messages": [], "messages": 1, "tokens": [], "tokens": [2]}',
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        json.dumps({"tokens": [1], "prompt": "a", "messages": MESSAGES, "stop": ["x"] * 10_000}).encode(),
        json.dumps(
            {"prompt": "a", "messages": MESSAGES, "logit_bias": dict.fromkeys(map(str, range(9999)), 1)}
        ).encode(),
        '{"prompt": "a"}'.encode("utf-16"),
        b"",
        b" " * 1000,
        b"\0",
    ]
    for body in bodies:
        check(*post(server, path, body))
    for body in (b" " * (MAX_BODY + 1), b"[" + b"1," * MAX_BODY):
        status, content = post(server, path, body)
        assert status == 413
        check(status, content)


def test_kinds_and_lengths(server: RunningServer) -> None:
    body = json.dumps(GOOD).encode()
    length, kind = b"Content-Length: %d" % len(body), b"Content-Type: application/json"
    for wrong in (b"text/plain", b"multipart/form-data", b"", b"\xff\xfe", b"application/jsonx", b"a" * 5000):
        status, content = post(server, COMPLETIONS, body, b"Content-Type: " + wrong, length)
        check(status, content)
        assert status == 415
    assert post(server, COMPLETIONS, body, length)[0] == 415
    for right in (b"application/json; charset=utf-8", b"APPLICATION/JSON", b"application/vnd.api+json"):
        assert post(server, COMPLETIONS, body, b"Content-Type: " + right, length)[0] == 200
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    assert post(server, COMPLETIONS, chunked, kind, b"Transfer-Encoding: chunked")[0] == 200
    pieces = b"".join(b"1;name=value\r\n%c\r\n" % byte for byte in body) + b"0\r\nTrailer: x\r\n\r\n"
    assert post(server, COMPLETIONS, pieces, kind, b"Transfer-Encoding: chunked")[0] == 200
    assert post(server, COMPLETIONS, body, kind, length, b"Expect: 100-continue")[0] == 200
    assert post(server, COMPLETIONS, body + b"more", kind, length)[0] == 200  # what follows is another request
    broken = [
        (kind, b"Content-Length: -1"),
        (kind, b"Content-Length: x"),
        (kind, b"Content-Length: " + b"9" * 40),
        (kind, length, b"Content-Length: 1"),
        (kind, length, b"Transfer-Encoding: chunked"),
        (kind, b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
        (kind, b"Transfer-Encoding: gzip"),
        (kind, b"Broken header"),
        (kind, b"A: \0"),
        (kind, b": empty"),
    ]
    for headers in broken:  # these are no HTTP, and need no body in any shape
        assert raw(server, head("POST", COMPLETIONS, *headers) + body) in REFUSED | {None}, headers
    for size in (b"zz", b"-5", b"ffffffffffffffffff", b""):
        data = head("POST", COMPLETIONS, kind, b"Transfer-Encoding: chunked") + size + b"\r\n" + body
        assert raw(server, data) in REFUSED | {None}, size


def test_methods_and_paths(server: RunningServer) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        with connected(server) as connection:
            connection.sendall(head(method, COMPLETIONS, b"Connection: close"))
            status, content = read_response(connection, method)
        check(status, content)
        assert status == 405
    paths = ["/v1", "/v1/", "//", "/v1/completions/", "/v1//models", "/%00", "/%ff%fe", "/v1/models/%2e%2e", "/../etc"]
    for path in [*paths, "/v1/models/" + "a" * 5000, "/v1/models/%F0%9F%98%80", "/health/..", "/?" + "a=b&" * 500]:
        with connected(server) as connection:
            connection.sendall(head("GET", path, b"Connection: close"))
            status, content = read_response(connection, "GET")
        if not path.startswith("/?"):  # the page
            check(status, content)
            assert status == 404, path
    for line in (b"GET", b"GET  HTTP/1.1", b"\xff\xfe", b"get /health HTTP/1.1", b"GET /health HTTP/9.9", b"\0" * 100):
        assert raw(server, line + b"\r\n\r\n") in REFUSED | {200, 505, None}, line
    long_header = b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"A: " + b"b" * 200_000 + b"\r\n\r\n"
    assert raw(server, long_header) in REFUSED | {200, None}


def test_keys(server: RunningServer) -> None:
    def run(value: bytes) -> None:
        data = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n"
        with connected(server) as connection:
            connection.sendall(data)
            status, content = read_response(connection, "GET")
        check(status, content)
        assert status == 401, value

    allowed = st.sampled_from(sorted(set(range(32, 256)) - {127}))
    garbage = st.lists(allowed, max_size=30).map(bytes)
    kinds = st.sampled_from(
        [b"", b"Bearer", b"Bearer ", b"bearer secret2", b"Basic c2VjcmV0", b"Bearer \xff", b"secret"]
    )
    many(st.one_of(kinds, garbage, garbage.map(lambda value: b"Bearer " + value)), 60, run)


def raw(server: RunningServer, data: bytes) -> int | None:
    """The status that comes back when nothing more is sent; None if the server just closes."""
    with connected(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        try:
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:  # the server has closed before
            if error.errno != errno.ENOTCONN:
                raise
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else None
    return None


def test_requests_that_end_too_early(server: RunningServer) -> None:
    """Half a head, half a body, and clients that go while they are answered; some without a goodbye."""
    bodies = [json.dumps(body | {"ignore_eos": True}).encode() for path, body in BODIES if path == COMPLETIONS]
    requests = [
        head("POST", COMPLETIONS, b"Content-Type: application/json", b"Content-Length: %d" % len(body)) + body
        for body in bodies
    ]

    def run(drawn: tuple[bytes, int, bool, bool]) -> None:
        request, n_sent, resets, reads = drawn
        with connected(server) as connection, contextlib.suppress(ConnectionError):
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(request[:n_sent])
            if reads and n_sent >= len(request):
                connection.recv(10)

    many(
        st.tuples(st.sampled_from(requests), st.integers(0, max(map(len, requests))), st.booleans(), st.booleans()),
        100,
        run,
    )
    for request in requests:
        for resets in (False, True):
            run((request, len(request), resets, True))
            run((request, len(request), resets, False))
