"""The fixture itself: it starts and ends servers, and tells what goes wrong in them."""

import socket
import threading

import httpx
import pytest
import uvicorn

from fastllama import Llama
from tests.support.running_server import MODEL, running_server


def test_serves_and_ends(llm: Llama) -> None:
    before = set(threading.enumerate())
    with running_server(llm) as server:
        body = httpx.get(f"{server.url}/v1/models").json()
        assert body["data"][0]["id"] == MODEL and server.service.engine.has_thread
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"server", "fastllama engine"}


def test_raises_what_the_server_raises(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        raise OSError("cannot start")

    monkeypatch.setattr(uvicorn.Server, "startup", fail)
    with pytest.raises(OSError, match="cannot start"), running_server(llm):
        pytest.fail("the block must not run")
