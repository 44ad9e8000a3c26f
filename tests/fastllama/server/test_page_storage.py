"""What the chat page keeps in the browser: over reloads and tabs, in files, and with a full or damaged storage."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.chat_page import Chat, open_chat
from tests.support.fake_chat_server import HOLD, FakeChatServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FULL = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
CLOSED = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"


def two_conversations(chat: Chat) -> None:
    chat.ask("About cats", "They *purr*.")
    chat.page.keyboard.press("Control+k")
    chat.ask("About dogs\nand more", "They bark.")


def test_conversations_survive_a_reload(chat: Chat, chat_server: FakeChatServer) -> None:
    two_conversations(chat)
    stats = chat.stats.inner_text()
    chat.page.reload()
    chat.expect(chat.answer).to_have_text("They bark.")  # the one that was shown
    chat.expect(chat.stats).to_have_text(stats)
    chat.expect(chat.page.locator("h1")).to_have_text("About dogs")
    chat.expect(chat.page.locator("nav .open")).to_have_text(["About dogs", "About cats"])  # the newest first
    chat.button("About cats").click()
    chat.expect(chat.answer.locator("em")).to_have_text("purr")
    chat.ask("More", "They sleep.")
    assert [message["content"] for message in chat_server.bodies[2]["messages"]] == [
        "About cats",
        "They *purr*.",
        "More",
    ]


@pytest.mark.slow
def test_conversation_is_renamed(chat: Chat) -> None:
    two_conversations(chat)
    field = chat.page.get_by_label("New title")
    for title, key in (("Dogs", "Enter"), ("Wolves", "Escape")):
        chat.page.get_by_role("button", name="Rename").first.press("Enter")
        field.fill(title)
        field.press(key)
        chat.expect(chat.page.locator("h1")).to_have_text("Dogs")
    chat.page.reload()
    chat.expect(chat.page.locator("nav .open")).to_have_text(["Dogs", "About cats"])


def test_conversation_is_deleted_and_brought_back(chat: Chat) -> None:
    two_conversations(chat)
    chat.button("Delete “About dogs”").press("Enter")
    chat.expect(chat.page.locator(".welcome")).to_be_visible()
    chat.button("Undo").click()
    chat.expect(chat.answer).to_have_text("They bark.")
    chat.button("Delete “About cats”").press("Enter")
    chat.expect(chat.page.locator("#notice")).to_contain_text("“About cats” is deleted.")
    chat.expect(chat.answer).to_have_text("They bark.")
    chat.page.reload()
    chat.expect(chat.page.locator("nav .open")).to_have_text(["About dogs"])


@pytest.mark.slow
def test_deleting_stops_the_answer(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.send("Count", "one", HOLD)
    chat.expect(chat.answer).to_have_text("one")
    chat.button("Delete “Count”").press("Enter")
    chat_server.wait_for_abort()
    chat.button("Undo").click()
    chat.expect(chat.stats).to_contain_text("Stopped")


@pytest.mark.slow
def test_closing_the_page_keeps_what_came(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.send("Count", "one", HOLD)
    chat.expect(chat.answer).to_have_text("one")
    chat.page.reload()
    chat_server.wait_for_abort()
    chat.expect(chat.answer).to_have_text("one")
    chat.expect(chat.stats).to_contain_text("Stopped")


@pytest.mark.slow
def test_file_of_conversations_is_written_and_read(chat: Chat, tmp_path: Path) -> None:
    two_conversations(chat)
    with chat.page.expect_download() as download:
        chat.button("Export all").click()
    path = tmp_path / "conversations.json"
    download.value.save_as(path)
    assert {one["title"] for one in json.loads(path.read_text(encoding="utf-8"))} == {"About cats", "About dogs"}
    chat.page.set_input_files("#file", path)  # conversations that are here stay beside those of the file
    chat.expect(chat.page.locator("nav .open")).to_have_count(4)
    chat.page.reload()
    chat.expect(chat.page.locator("nav .open")).to_have_count(4)
    chat.page.evaluate("localStorage.clear()")
    chat.page.reload()
    chat.page.set_input_files("#file", path)
    chat.expect(chat.page.locator("#notice")).to_contain_text("2 conversations are imported.")
    chat.button("About cats").click()
    chat.expect(chat.answer).to_have_text("They purr.")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"messages": [{"role": "tool", "content": "x"}]}]'])
def test_other_files_are_refused(chat: Chat, tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    chat.page.set_input_files("#file", path)
    chat.expect(chat.page.locator("#notice")).to_contain_text("This file has no conversations")
    chat.expect(chat.page.locator("nav .open")).to_have_count(0)


@pytest.mark.parametrize("script", [FULL, pytest.param(CLOSED, marks=pytest.mark.slow)], ids=["full", "closed"])
def test_chat_works_without_storage(browser: "Browser", chat_server: FakeChatServer, script: str) -> None:
    with open_chat(browser, chat_server) as chat:
        chat.page.add_init_script(script)
        chat.open().ask("Hi", "Hello")
        chat.expect(chat.page.locator("#notice")).to_contain_text("This browser's storage is full or closed")
        chat.ask("More", "Yes")
        chat.expect(chat.messages).to_have_count(4)


@pytest.mark.slow
def test_damaged_entries_are_ignored(chat: Chat) -> None:
    chat.ask("About cats", "They purr.")
    entries = {
        "chat/a": "{",
        "chat/b": "null",
        "chat/c": '{"messages": [{}]}',
        "settings": "[",
        "theme": "x",
        "key": "{",
    }
    for name, value in entries.items():
        chat.page.evaluate("([name, value]) => localStorage.setItem('fastllama/' + name, value)", [name, value])
    chat.page.reload()
    chat.expect(chat.page.locator("nav .open")).to_have_text(["About cats"])
    chat.ask("More", "They sleep.")


@pytest.mark.slow
def test_tabs_see_each_others_conversations(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.ask("About cats", "They purr.")
    other = chat.new_tab()
    other.goto(chat_server.url)
    other.get_by_role("button", name="About cats", exact=True).click()
    chat.ask("More", "They sleep.")
    chat.expect(other.locator("article")).to_have_count(4)
    other.get_by_role("button", name="Delete “About cats”").press("Enter")
    chat.expect(chat.page.locator("nav .open")).to_have_count(0)
