"""The chat page in chromium, with a fake of the API: what is sent, what is shown, and what goes wrong."""

import re
from typing import TYPE_CHECKING

import pytest

from tests.support.chat_page import Chat, open_chat
from tests.support.fake_chat_server import HOLD, MODEL, FakeChatServer, Reply, error_reply

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_answer_is_streamed(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.expect(chat.page.locator("#model")).to_have_text(MODEL)
    chat.send("Hi there", "Hel", HOLD, "lo", "!")
    chat.expect(chat.answer).to_have_text("Hel")
    chat.expect(chat.button("Stop")).to_be_visible()
    chat.expect(chat.input).to_have_value("")
    chat_server.go_on()
    chat.expect(chat.answer).to_have_text("Hello!")
    chat.expect(chat.stats).to_have_text(
        re.compile(r"^3 tokens · \d+\.\d tokens/s · first token after \d+\.\d\d s · prompt 7 \(3 cached\)$")
    )
    chat.expect(chat.button("Send")).to_be_visible()
    chat.expect(chat.input).to_be_focused()
    assert chat.page.title() == "Hi there · fastllama"
    assert chat_server.bodies == [
        {
            "model": MODEL,
            "messages": [user("Hi there")],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_conversation_is_sent_with_each_message(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.ask("One?", "1")
    chat.ask("Two?", "2")
    assert chat_server.bodies[1]["messages"] == [user("One?"), assistant("1"), user("Two?")]
    chat.expect(chat.messages).to_have_count(4)


@pytest.mark.slow
def test_idea_is_sent(chat: Chat, chat_server: FakeChatServer) -> None:
    chat_server.replies.append(Reply(["Paris"]))
    chat.button("What is the capital of France?").click()
    chat.expect(chat.answer).to_have_text("Paris")
    chat.expect(chat.input).to_be_focused()


def test_characters_and_events_split_anywhere(chat: Chat) -> None:
    """The parser of events gets bytes that end inside of a character, of a line and of an empty line."""
    events = 'data: {"a": "é"}\r\n\r\n: comment\n\ndata: {"b":\ndata: 2}\n\ndata: [DONE]\n\n'
    found = chat.page.evaluate(
        """async (text) => {
          const bytes = new TextEncoder().encode(text), found = [];
          const stream = new ReadableStream({ start(controller) {
            for (const byte of bytes) controller.enqueue(Uint8Array.of(byte));
            controller.close();
          } });
          for await (const events of serverEvents(stream)) found.push(...events);
          return found;
        }""",
        events,
    )
    assert found == ['{"a": "é"}', '{"b":\n2}', "[DONE]"]


def test_stop_aborts_the_request(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.send("Count", "one ", HOLD, "two")
    chat.expect(chat.answer).to_have_text("one")
    chat.button("Stop").click()
    chat_server.wait_for_abort()
    chat.expect(chat.stats).to_contain_text("Stopped · first token after")
    chat.expect(chat.answer).to_have_text("one")
    chat.expect(chat.input).to_be_focused()
    chat.ask("Go on", "two")
    assert chat_server.bodies[1]["messages"] == [user("Count"), assistant("one "), user("Go on")]


def test_stop_before_the_first_token(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.send("Count", HOLD)
    chat.expect(chat.page.locator(".waiting")).to_be_visible()
    chat_server.wait_for_request()
    chat.page.keyboard.press("Escape")
    chat_server.wait_for_abort()
    chat.expect(chat.stats).to_have_text("Stopped")


@pytest.mark.slow
def test_message_waits_while_an_answer_is_written(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.send("Count", "one", HOLD)
    chat.input.fill("Next")
    chat.input.press("Enter")
    chat.expect(chat.input).to_have_value("Next")
    chat_server.go_on()
    chat.expect(chat.stats).to_be_visible()
    assert len(chat_server.bodies) == 1


def test_retry_asks_again(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.ask("Name?", "Ann")
    chat_server.replies.append(Reply(["Ben"]))
    chat.button("Retry").click()
    chat.expect(chat.answer).to_have_text("Ben")
    chat.expect(chat.messages).to_have_count(2)
    assert chat_server.bodies[1] == chat_server.bodies[0]


def test_edit_drops_what_follows(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.ask("One?", "1")
    chat.ask("Two?", "2")
    chat.button("Edit").first.click()
    field = chat.page.get_by_label("Your message")
    chat.expect(field).to_be_focused()
    field.press("Escape")
    chat.expect(chat.messages.first).to_contain_text("One?")
    chat.button("Edit").first.click()
    chat_server.replies.append(Reply(["11"]))
    field.fill("Eleven?")
    field.press("Enter")
    chat.expect(chat.answer).to_have_text("11")
    chat.expect(chat.messages).to_have_count(2)
    assert chat_server.bodies[2]["messages"] == [user("Eleven?")]


def test_answer_is_copied(browser: "Browser", chat_server: FakeChatServer) -> None:
    with open_chat(browser, chat_server, permissions=["clipboard-read", "clipboard-write"]) as chat:
        chat.open().ask("Code?", "See **this**:\n```py\nx = 1\n```")
        for name, text in (("Copy", "See **this**:\n```py\nx = 1\n```"), ("Copy code", "x = 1")):
            button = chat.page.locator("article.assistant").get_by_role("button", name=name, exact=True)
            chat.page.evaluate("speak('')")
            button.click()
            chat.expect(chat.page.locator("#spoken")).to_have_text("Copied.")
            assert chat.page.evaluate("navigator.clipboard.readText()") == text


def test_two_conversations_are_answered_at_once(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.send("First", "a", HOLD, "b")
    chat.expect(chat.answer).to_have_text("a")
    chat.button("New chat Ctrl K").click()
    chat.ask("Second", "c")
    chat.button("First").click()
    chat.expect(chat.answer).to_have_text("a")
    chat_server.go_on()
    chat.expect(chat.answer).to_have_text("ab")
    chat.expect(chat.stats).to_contain_text("2 tokens")


def test_settings_reach_the_request(chat: Chat, chat_server: FakeChatServer) -> None:
    values = {"Temperature": "0.5", "Top-p": "0.9", "Max tokens": "64", "Seed": "7"}
    chat.button("Settings").click()
    for label, value in values.items():
        chat.page.get_by_label(label).fill(value)
    chat.page.get_by_label("System prompt").fill("Be brief.")
    chat.button("Save").click()
    chat.expect(chat.input).to_be_focused()
    chat.ask("Hi", "Hello")
    expected = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 7}
    body = chat_server.bodies[0]
    assert {name: body[name] for name in expected} == expected
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, user("Hi")]

    chat.page.reload()
    chat.button("Settings").click()
    chat.expect(chat.page.get_by_label("System prompt")).to_have_value("Be brief.")
    chat.expect(chat.page.get_by_label("Top-p")).to_have_value("0.9")
    chat.page.get_by_label("Top-p").fill("")
    chat.button("Save").click()
    chat.expect(chat.input).to_be_focused()  # the dialog is closed
    chat.page.keyboard.press("Control+k")
    chat.ask("Hi", "Hello")
    assert "top_p" not in chat_server.bodies[1] and chat_server.bodies[1]["seed"] == 7
    assert chat_server.bodies[1]["messages"] == [user("Hi")]  # the system prompt is of one conversation


@pytest.mark.slow
def test_settings_out_of_range_are_not_saved(chat: Chat) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("Top-p").fill("1.5")
    chat.button("Save").click()
    chat.expect(chat.page.get_by_label("Top-p")).to_be_focused()  # the dialog stays open
    chat.button("Cancel").click()
    assert chat.page.evaluate("settings.top_p") is None


@pytest.mark.parametrize(
    ("status", "headers", "hint"),
    [
        (400, {}, "Change the message or the settings"),
        pytest.param(413, {}, "Send a shorter message", marks=pytest.mark.slow),
        (429, {"Retry_After": "3"}, "Try again in 3 s."),
        (503, {}, "The server is starting or stopping."),
        pytest.param(500, {}, "the server's log has the reason", marks=pytest.mark.slow),
    ],
)
def test_refusal_is_shown(
    chat: Chat, chat_server: FakeChatServer, status: int, headers: dict[str, str], hint: str
) -> None:
    chat_server.replies.append(error_reply(status, "This is the reason.", **headers))
    chat.input.fill("Hi")
    chat.input.press("Enter")
    chat.expect(chat.error).to_contain_text("This is the reason.")
    chat.expect(chat.error).to_contain_text(hint)
    chat.expect(chat.page.locator("#spoken")).to_contain_text("This is the reason.")
    chat_server.replies.append(Reply(["Hello"]))
    chat.button("Try again").click()
    chat.expect(chat.answer).to_have_text("Hello")
    chat.expect(chat.error).to_have_count(0)
    assert chat_server.bodies[1] == chat_server.bodies[0]


def test_error_in_the_middle_keeps_what_came(chat: Chat) -> None:
    chat.send("Count", "one ", {"error": {"message": "The step failed."}})
    chat.expect(chat.error).to_contain_text("The step failed.")
    chat.expect(chat.answer).to_have_text("one")


def test_lost_connection_is_shown(chat: Chat, chat_server: FakeChatServer) -> None:
    chat_server.replies.append(Reply(["one", HOLD], is_cut=True))
    chat.input.fill("Count")
    chat.input.press("Enter")
    chat.expect(chat.answer).to_have_text("one")
    chat_server.go_on()
    chat.expect(chat.error).to_contain_text("The connection was lost before the answer's end. What came is kept.")
    chat.expect(chat.answer).to_have_text("one")


def test_unreachable_server_is_shown(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.input.fill("Hi")
    chat.input.press("Enter")
    chat.expect(chat.error).to_contain_text("The server cannot be reached.")
    chat.page.unroute("**/v1/chat/completions")
    chat.ask("Are you there?", "Yes")  # two messages without an answer between them are one
    assert chat_server.bodies[0]["messages"] == [user("Hi\n\nAre you there?")]


@pytest.mark.slow
def test_answer_at_the_limit_of_tokens(chat: Chat, chat_server: FakeChatServer) -> None:
    chat_server.replies.append(Reply(["one"], finish_reason="length"))
    chat.input.fill("Count")
    chat.input.press("Enter")
    chat.expect(chat.stats).to_contain_text("Cut: the limit of tokens was reached")


def test_key_is_asked_for_and_kept(chat: Chat, chat_server: FakeChatServer) -> None:
    chat_server.key = "right"
    chat.page.reload()
    field = chat.page.get_by_label("API key, kept in this browser only")
    for key in ("wrong", "right"):
        field.fill(key)
        chat.button("Continue").click()
    chat.expect(chat.page.locator("#model")).to_have_text(MODEL)
    chat.ask("Hi", "Hello")
    chat.page.reload()
    chat.expect(chat.page.locator("#model")).to_have_text(MODEL)
    chat.expect(field).to_be_hidden()

    chat_server.key = "changed"  # an answer that is refused for the key is asked for again with another
    chat_server.replies.append(Reply(["Welcome back"]))
    chat.input.fill("Still there?")
    chat.input.press("Enter")
    chat.expect(chat.error).to_contain_text("Incorrect API key")
    field.fill("changed")
    field.press("Enter")
    chat.expect(chat.answer).to_have_text("Welcome back")


@pytest.mark.slow
def test_page_works_below_a_prefix(browser: "Browser", chat_server: FakeChatServer) -> None:
    with open_chat(browser, chat_server) as chat:
        chat.open("behind/a/proxy/")
        chat.expect(chat.page.locator("#model")).to_have_text(MODEL)
        chat.ask("Hi", "Hello")
    assert chat_server.paths == [f"/behind/a/proxy/{path}" for path in ("", "v1/models", "v1/chat/completions")]


@pytest.mark.slow
def test_long_answer_is_followed_until_the_reader_scrolls(chat: Chat, chat_server: FakeChatServer) -> None:
    log, newest = chat.page.locator("#log"), chat.button("To the newest text")
    lines = "".join(f"line {number}\n\n" for number in range(60))
    chat.send("Go", lines, HOLD, lines, HOLD, lines)
    chat.expect(chat.page.get_by_text("line 59")).to_be_in_viewport()
    log.press("Home")
    chat.expect(newest).to_be_visible()
    chat.expect(log).to_have_js_property("scrollTop", 0)  # it scrolls smoothly
    chat_server.go_on()
    chat.expect(chat.page.get_by_text("line 59")).to_have_count(2)
    assert log.evaluate("log => log.scrollTop") == 0
    newest.click()
    chat.expect(newest).to_be_hidden()
    chat_server.go_on()
    chat.expect(chat.stats).to_be_in_viewport()
