"""Drives the chat page in a browser, and checks with every test what holds for all of them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.support.fake_chat_server import FakeChatServer, Hold, Reply

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page
    from playwright.sync_api._generated import LocatorAssertions

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 60_000.0  # for conditions that come at once on an idle machine


def find_chromium() -> str | None:
    """The path of the browser that is installed."""
    return next((path for path in map(shutil.which, CHROMIUM_NAMES) if path), None)


@contextmanager
def launch(chromium: str) -> "Iterator[Browser]":
    """The browser at a path, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers run tests as root, for whom chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Chat:
    """The page in a context of its own, which is opened for one test."""

    def __init__(self, context: "BrowserContext", server: FakeChatServer) -> None:
        self.context, self.server = context, server
        self.problems: list[str] = []
        context.on("request", lambda request: self._check_address(request.url))
        self.page = self.new_tab()

    def new_tab(self) -> "Page":
        """Another page of the same browser's profile, not yet at an address."""
        page = self.context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", lambda message: self._check_message(message.type, message.text))
        return page

    def open(self, path: str = "") -> "Chat":
        """Go to the page."""
        self.page.goto(self.server.url + path)
        return self

    @property
    def input(self) -> "Locator":
        """The field for the next message."""
        return self.page.get_by_label("Message", exact=True)

    @property
    def answer(self) -> "Locator":
        """The text of the last answer."""
        return self.page.locator("article.assistant .markdown").last

    @property
    def messages(self) -> "Locator":
        """All messages."""
        return self.page.locator("article")

    @property
    def stats(self) -> "Locator":
        """The line under the last answer, which comes when it has ended."""
        return self.page.locator("article:last-child .stats")

    @property
    def error(self) -> "Locator":
        """What is shown in place of an answer."""
        return self.page.locator(".error")

    def button(self, name: str) -> "Locator":
        """The button with exactly this name."""
        return self.page.get_by_role("button", name=name, exact=True)

    def expect(self, locator: "Locator") -> "LocatorAssertions":
        """Assertions that wait until they hold."""
        from playwright.sync_api import expect

        expect.set_options(timeout=WAIT_MS)
        return expect(locator)

    def send(self, text: str, *parts: "str | Hold | dict[str, Any]") -> None:
        """Send a message, which will be answered with these parts."""
        self.server.replies.append(Reply(parts))
        self.input.fill(text)
        self.input.press("Enter")

    def ask(self, text: str, *parts: "str | Hold | dict[str, Any]") -> None:
        """Send a message, and wait for the end of its answer."""
        before = self.messages.count()
        self.send(text, *parts)
        self.expect(self.messages).to_have_count(before + 2)
        self.expect(self.stats).to_be_visible()

    def _check_address(self, url: str) -> None:
        if not url.startswith((self.server.url, "data:", "blob:")):
            self.problems.append(f"a request to {url}")

    def _check_message(self, kind: str, text: str) -> None:
        """No error on the console but those that chromium writes for each answer with a status of 400 and more."""
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.problems.append(f"{kind}: {text}")


@contextmanager
def open_chat(browser: "Browser", server: FakeChatServer, **options: Any) -> Iterator[Chat]:
    """The page in a new context. options: of the context. At the end no script may have failed."""
    context = browser.new_context(**options)
    chat = Chat(context, server)
    yield chat
    context.close()
    assert not chat.problems
