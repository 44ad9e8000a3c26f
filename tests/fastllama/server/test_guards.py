"""Keys, limits of bodies, and errors: all have OpenAI's shape."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fastllama import Llama
from fastllama.openai_api import chunks
from fastllama.server import errors, exchange
from fastllama.server.settings import ServerSettings
from tests.support.running_server import RunningServer, running_server
from tests.support.timeouts import HANG_SECONDS

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "Once upon a time", "max_tokens": 2}
SETTINGS = ServerSettings(
    api_keys=("first", "second"), max_body_bytes=1000, body_seconds=0.2, allow_origins=("https://page.example",)
)
OTHER_HOSTS = ["evil.example:8123", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "notlocalhost"]
OTHER_HOSTS += ["0.0.0.0:8000", "10.0.0.1", "[2001:db8::1]:80", "[evil.example]", "::1", "127.1", "x@localhost", ""]


@pytest.fixture(scope="module")
def server(llm: Llama) -> Iterator[RunningServer]:
    with running_server(llm, SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    key = {"Authorization": "Bearer first"}
    with httpx.Client(base_url=server.url, timeout=HANG_SECONDS, headers=key) as client:
        yield client


def error_of(answer: httpx.Response, status: int, code: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code and body["error"]["type"] == errors.TYPES[status]
    found: dict[str, Any] = body["error"]
    return found


@pytest.mark.parametrize("header", [None, "", "first", "Bearer", "Bearer third", "Basic first", "Bearer first second"])
def test_a_wrong_key_is_refused(server: RunningServer, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nowhere")):
        answer = httpx.request(method, server.url + path, headers=headers)
        assert "Authorization: Bearer KEY" in error_of(answer, 401, "invalid_api_key")["message"]
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["Bearer first", "bearer second", "BEARER  first"])
def test_each_key_is_known(server: RunningServer, header: str) -> None:
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": header}).status_code == 200


@pytest.fixture(scope="module")
def without_key(llm: Llama) -> Iterator[RunningServer]:
    with running_server(llm, ServerSettings(allow_origins=("https://page.example",))) as server:
        yield server


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_a_page_that_gives_its_name_this_address_is_refused(without_key: RunningServer, host: str) -> None:
    """DNS rebinding: for a browser that page is of the same origin."""
    headers = {"Host": host, "Origin": f"http://{host}"}
    for method, path in (("GET", "/v1/models"), ("GET", "/"), ("GET", "/nowhere"), ("OPTIONS", COMPLETIONS)):
        answer = httpx.request(method, without_key.url + path, headers=headers)
        assert "--api_key" in error_of(answer, 403, "host_not_allowed")["message"]
    answer = httpx.post(without_key.url + COMPLETIONS, json=BODY, headers=headers)
    error_of(answer, 403, "host_not_allowed")


@pytest.mark.parametrize("port", ["", ":8000", ":1"])
@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.8.7.6", "[::1]"])
def test_names_of_this_machine_need_no_key(without_key: RunningServer, host: str, port: str) -> None:
    assert httpx.get(f"{without_key.url}/v1/models", headers={"Host": host + port}).status_code == 200


def test_a_client_of_http_1_0_may_send_no_host(without_key: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", without_key.port), HANG_SECONDS) as old:
        old.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert old.recv(4096).startswith(b"HTTP/1.1 200")


def test_with_a_key_any_host_is_answered(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"Host": "served.example"}).status_code == 200


def test_the_page_and_the_health_need_no_key(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy


def test_pages_of_allowed_origins_only(server: RunningServer) -> None:
    for origin, is_allowed in (("https://page.example", True), ("https://other.example", False)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = httpx.options(server.url + COMPLETIONS, headers=headers)
        assert (answer.headers.get("access-control-allow-origin") == origin) == is_allowed


def test_a_body_that_is_too_large(client: httpx.Client) -> None:
    large = json.dumps(BODY | {"prompt": "x" * 2000})
    kind = {"Content-Type": "application/json"}
    answer = client.post(COMPLETIONS, content=large, headers=kind)
    message = error_of(answer, 413, "body_too_large")["message"]
    assert f"{len(large)} bytes" in message and f"(--max_body_mib {1000 / 2**20:g})" in message
    answer = client.post(COMPLETIONS, content=iter([large.encode()]), headers=kind)  # in chunks, without its size
    assert "more than 1000 bytes" in error_of(answer, 413, "body_too_large")["message"]
    assert client.post(COMPLETIONS, json=BODY).status_code == 200


def test_a_client_that_offers_http2_is_answered(client: httpx.Client) -> None:
    """As curl --http2 does, and Java's HttpClient."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQCAAAAAAIAAAAA"}
    assert client.post(COMPLETIONS, json=BODY, headers=offer).status_code == 200


def test_a_body_that_does_not_arrive(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), HANG_SECONDS) as slow:
        slow.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\n".encode())
        slow.sendall(b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
        answer = slow.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in answer


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "json"])
def test_a_body_of_another_type(client: httpx.Client, kind: str) -> None:
    """Web pages may send these to any server without asking it first."""
    answer = client.post(COMPLETIONS, content=json.dumps(BODY), headers={"Content-Type": kind})
    error_of(answer, 415, "unsupported_media_type")


def test_types_with_parameters_are_json(client: httpx.Client) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        answer = client.post(COMPLETIONS, content=json.dumps(BODY), headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"prompt": "x",}', b"\xff\xfe\xfa", b"[" * 900, b'{"prompt": "a", "prompt": "b"}', b"nul"]
)
def test_a_body_that_is_not_json(client: httpx.Client, body: bytes) -> None:
    answer = client.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    error_of(answer, 400, "invalid_json")


def test_unknown_routes_and_methods(client: httpx.Client) -> None:
    error_of(client.get("/v1/nowhere"), 404, "not_found")
    answer = client.get(COMPLETIONS)
    error_of(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_a_fault_of_the_server_keeps_its_text_to_itself(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(exchange, "response", fail)
    answer = client.post(COMPLETIONS, json=BODY)
    assert "secret" not in error_of(answer, 500, "internal_error")["message"]
    monkeypatch.setattr(exchange, "new_writer", fail)
    answer = client.post(COMPLETIONS, json=BODY | {"stream": True})
    assert "secret" not in error_of(answer, 500, "internal_error")["message"]
    assert sum(record.exc_info is not None for record in caplog.records) == 2


def test_a_fault_after_the_first_chunk_is_an_event(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = chunks.new_writer

    def failing(*arguments: Any) -> Any:
        writer = real(*arguments)
        monkeypatch.setattr(writer, "end", lambda: 1 / 0, raising=True)
        return writer

    monkeypatch.setattr(exchange, "new_writer", failing)
    answer = client.post(COMPLETIONS, json=BODY | {"stream": True})
    pieces = answer.text.split("\n\n")
    assert answer.status_code == 200 and pieces[-2:] == ["data: [DONE]", ""]
    assert json.loads(pieces[-3].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert any(record.exc_info is not None for record in caplog.records)


def test_metrics_have_vllms_names(client: httpx.Client) -> None:
    before = client.get("/metrics").text
    client.post(COMPLETIONS, json=BODY)
    after = client.get("/metrics").text

    def value(text: str, name: str) -> float:
        (line,) = (line for line in text.splitlines() if line.startswith(f'{name}{{model_name="served"}}'))
        return float(line.split()[-1])

    for name, grown_by in (
        ("vllm:generation_tokens_total", 2),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:inter_token_latency_seconds_count", 1),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:request_generation_tokens_sum", 2),
        ("vllm:num_requests_running", 0),
        ("vllm:kv_cache_usage_perc", 0),
    ):
        assert value(after, name) - value(before, name) == grown_by, name
