"""The fixture itself: it starts and ends servers, and tells what goes wrong in them."""

import socket
import threading

import httpx
import pytest
import uvicorn

from fastllama import Llama
from fastllama.server.settings import ServerSettings
from tests.support.running_server import MODEL, running_server
from tests.support.timeouts import HANG_SECONDS


def test_serves_and_ends(llm: Llama) -> None:
    before = set(threading.enumerate())
    with running_server(llm) as server:
        body = httpx.get(f"{server.url}/v1/models").json()
        assert body["data"][0]["id"] == MODEL and server.engine.has_thread
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"server", "fastllama engine"}


def test_a_prefix_that_a_proxy_removes(llm: Llama) -> None:
    """The proxy asks for paths without it, and only addresses that are told to clients have it."""
    with running_server(llm, ServerSettings(api_keys=("key",)), root_path="/models/one") as server:
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}  # needs no key
        assert httpx.get(f"{server.url}/").headers["content-type"].startswith("text/html")
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer key"}, timeout=HANG_SECONDS) as client:
            assert client.get("/v1/models/served").json()["id"] == MODEL
            answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
            assert answer.status_code == 200, answer.text
            assert client.get("/v1/nowhere").status_code == 404
            assert client.get("/openapi.json").json()["servers"] == [{"url": "/models/one"}]


def test_raises_what_the_server_raises(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        raise OSError("cannot start")

    monkeypatch.setattr(uvicorn.Server, "startup", fail)
    with pytest.raises(OSError, match="cannot start"), running_server(llm):
        pytest.fail("the block must not run")
