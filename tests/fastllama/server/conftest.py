"""One model that all tests of the server share, a server for each file and its client.

For the tests of the page a browser, and for each of them a fake server and a new profile.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from fastllama import Llama, builtin_checkpoint
from tests.support.chat_page import Chat, find_chromium, launch, open_chat
from tests.support.fake_chat_server import FakeChatServer
from tests.support.running_server import RunningServer, running_server
from tests.support.timeouts import HANG_SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Browser


MAX_SEQ_LEN, ROWS = 256, 4


@pytest.fixture(scope="package")
def llm() -> Llama:
    folder, tokenizer = builtin_checkpoint()
    return Llama.build(folder, tokenizer, MAX_SEQ_LEN, ROWS, device="cpu")


@pytest.fixture(scope="module")
def server(llm: Llama) -> Iterator[RunningServer]:
    """A server without limits of its own, for all tests of a file."""
    with running_server(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
    path = find_chromium()
    if path is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with launch(path) as browser:
        yield browser


@pytest.fixture
def chat_server() -> Iterator[FakeChatServer]:
    with FakeChatServer() as server:
        yield server


@pytest.fixture
def chat(browser: "Browser", chat_server: FakeChatServer) -> Iterator[Chat]:
    """The page, opened."""
    with open_chat(browser, chat_server) as chat:
        yield chat.open()


@pytest.fixture(scope="module")
def shared(browser: "Browser") -> Iterator[Chat]:
    """The page, opened once for all tests of a file, which only call its functions."""
    with FakeChatServer() as server, open_chat(browser, server) as chat:
        yield chat.open()
