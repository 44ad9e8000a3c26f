"""The chat page for everyone: keyboard alone, screen readers, both themes, narrow screens, input methods."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat_page import Chat, open_chat
from tests.support.fake_chat_server import HOLD, FakeChatServer, Reply, error_reply

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ANSWER = (
    """# Title

A *text* with `code`, [a link](https://example.com) and averylongwordwithoutanybreak"""
    + "x" * 200
    + """

> A quote

1. one
   - two

```python
very_long_line_of_code = "which is wider than a telephone's screen, and is scrolled inside of its own box"
```

| a wide table | with columns | that have | more text | than fits |
|---|---|---|---|---|
| 1 | 2 | 3 | 4 | averylongwordwithoutanybreak |
"""
)
THEMES = ("light", "dark")
NARROW = {"width": 360, "height": 640}


@contextmanager
def full_page(browser: "Browser", server: FakeChatServer, **options: Any) -> Iterator[Chat]:
    """The page with everything that it can show at once: an answer, an error and a note."""
    with open_chat(browser, server, **options) as chat:
        chat.open().ask("Short", "Yes")
        chat.page.keyboard.press("Control+k")
        chat.ask("Show me a message that is a little longer than the others", ANSWER)
        server.replies.append(error_reply(503, "The server is stopping."))
        chat.input.fill("Again")
        chat.input.press("Enter")
        chat.expect(chat.error).to_be_visible()
        chat.page.evaluate("notify('A note', 'Undo', () => {})")
        yield chat


# Every visible text and the border of every field, with the contrast to what is behind it.
CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(color).map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
  };
  const found = [];
  for (const node of document.querySelectorAll("body *:not(script)")) {
    if (!node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const name = `${node.localName}.${node.className} ${node.textContent.slice(0, 20)}`;
    if (hasText || node.localName === "svg") found.push([name, hasText ? 4.5 : 3, ratio(style.color, behind(node))]);
    if (node.matches("input, textarea")) {
      found.push([name, 4.5, ratio(getComputedStyle(node, "::placeholder").color, behind(node))]);
      const box = node.closest(".field") ?? node;
      found.push([name, 3, ratio(getComputedStyle(box).borderTopColor, behind(box.parentElement))]);
    }
  }
  return found;
}"""


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_contrast_is_enough(browser: "Browser", chat_server: FakeChatServer, theme: str) -> None:
    """WCAG 2.2, level AA: 4.5 for texts, 3 for icons and the borders of fields."""
    with full_page(browser, chat_server, color_scheme=theme) as chat:
        found = chat.page.evaluate(CONTRASTS)
        chat.page.get_by_role("button", name="Edit").first.click()
        chat.button("Settings").click()
        found += chat.page.evaluate(CONTRASTS)
        accent = chat.page.evaluate("getComputedStyle(document.querySelector('.markdown a')).color")
        chat.expect(chat.page.get_by_label("System prompt")).to_have_css("outline-color", accent)  # focus: as the links
    assert len(found) > 80
    assert [one for one in found if one[2] < one[1]] == []


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_theme_is_switched_and_kept(browser: "Browser", chat_server: FakeChatServer, theme: str) -> None:
    colors = {"light": "rgb(253, 252, 250)", "dark": "rgb(24, 25, 27)"}
    other = THEMES[theme == "light"]
    with open_chat(browser, chat_server, color_scheme=theme) as chat:
        body = chat.open().page.locator("body")
        chat.expect(body).to_have_css("background-color", colors[theme])
        switch = chat.button("Dark theme")
        chat.expect(switch).to_have_attribute("aria-pressed", str(theme == "dark").lower())
        switch.click()
        chat.page.reload()
        chat.expect(body).to_have_css("background-color", colors[other])
        chat.expect(switch).to_have_attribute("aria-pressed", str(other == "dark").lower())
        switch.click()
        chat.page.emulate_media(color_scheme=other)  # type: ignore[arg-type]
        chat.expect(body).to_have_css("background-color", colors[other])  # the system's theme is followed again


def test_controls_and_landmarks_have_names(browser: "Browser", chat_server: FakeChatServer) -> None:
    """In the tree that screen readers read, also while an answer is written, and in the dialogs."""
    with full_page(browser, chat_server) as chat:
        trees = [chat.page.locator("body").aria_snapshot()]
        chat.page.get_by_role("button", name="Rename").first.press("Enter")
        trees.append(chat.page.locator("body").aria_snapshot())
        chat.page.keyboard.press("Escape")
        chat.page.get_by_role("button", name="Edit").first.click()
        trees.append(chat.page.locator("body").aria_snapshot())
        chat.button("Settings").click()
        trees.append(chat.page.locator("body").aria_snapshot())
        chat.page.keyboard.press("Escape")
        chat.page.evaluate("askForKey()")
        trees.append(chat.page.locator("body").aria_snapshot())
    roles = "button|textbox|spinbutton|link|dialog|complementary|navigation|log|article|group|combobox|checkbox"
    for tree in trees:
        assert re.findall(rf"^ *- (?:{roles})(?! \"[^\"]+\").*$", tree, re.MULTILINE) == []
    names = re.findall(r'- (\w+) "([^"]*)"', "\n".join(trees))
    assert {
        ("complementary", "Conversations"),
        ("navigation", "Kept conversations"),
        ("log", "Messages"),
        ("article", "You"),
        ("article", "Answer"),
        ("textbox", "Message"),
        ("textbox", "Your message"),
        ("textbox", "New title"),
        ("spinbutton", "Temperature"),
        ("dialog", "Settings"),
        ("dialog", "The server asks for its API key"),
        ("button", "Copy code"),
        ("button", "Try again"),
        ("button", "Send"),
        ("button", "Rename “Short”"),
        ("button", "Delete “Short”"),
    } <= set(names)
    assert all(landmark in trees[0] for landmark in ("- banner:", "- main:", "- heading "))


@pytest.mark.slow
def test_screen_reader_hears_begin_and_end_only(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.expect(chat.page.get_by_role("log")).to_have_attribute("aria-live", "off")
    chat.page.evaluate(
        """() => {
          window.heard = [];
          const watch = new MutationObserver(() => window.heard.push(document.getElementById("spoken").textContent));
          watch.observe(document.getElementById("spoken"), { childList: true });
        }"""
    )
    chat.ask("Count", *"123456789")
    assert chat.page.evaluate("window.heard") == ["The answer is being written.", "The answer is complete."]


@pytest.mark.slow
def test_everything_is_reached_with_tab(browser: "Browser", chat_server: FakeChatServer) -> None:
    """Each control gets the focus on the way round, and shows it."""
    with full_page(browser, chat_server) as chat:
        controls = chat.page.evaluate(
            """() => [...document.querySelectorAll("button, a[href], textarea, input, [tabindex='0']")]
              .filter((node) => node.checkVisibility({ visibilityProperty: true }))
              .map((node, index) => (node.dataset.number = index))"""
        )
        reached: set[int] = set()
        hidden = []
        for _ in range(2 * len(controls)):  # between them are wide code and tables, which are scrolled
            chat.page.keyboard.press("Tab")
            number, outline = chat.page.evaluate(
                """() => {
                  const node = document.activeElement, shown = node.id === "input" ? node.form : node;
                  const style = getComputedStyle(shown);
                  const isShown = style.outlineStyle !== "none" || style.boxShadow !== "none";
                  const isVisible = Number(style.opacity) === 1 && shown.offsetWidth > 10;
                  return [Number(node.dataset.number), isShown && isVisible];
                }"""
            )
            reached.add(number)
            hidden += [] if outline else [number]
    assert len(controls) > 20
    assert set(controls) - reached == set()
    assert not set(controls) & set(hidden)


def test_keyboard_alone_is_enough(chat: Chat, chat_server: FakeChatServer) -> None:
    """A chat, a new line, stop, a new conversation, and the settings, without a pointer."""
    keyboard = chat.page.keyboard
    chat.expect(chat.input).to_be_focused()
    chat_server.replies.append(Reply(["one", HOLD]))
    keyboard.type("First line")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    keyboard.press("Enter")
    chat.expect(chat.answer).to_have_text("one")
    keyboard.press("Escape")
    chat_server.wait_for_abort()
    chat.expect(chat.stats).to_contain_text("Stopped")
    assert chat_server.bodies[0]["messages"][0]["content"] == "First line\nsecond line"
    keyboard.press("Control+k")
    chat.expect(chat.page.locator(".welcome")).to_be_visible()
    chat.expect(chat.input).to_be_focused()
    chat.button("Settings").focus()
    keyboard.press("Enter")
    chat.page.get_by_label("Seed").focus()
    keyboard.type("5")
    keyboard.press("Enter")
    chat.expect(chat.input).to_be_focused()
    chat.ask("Hi", "Hello")
    assert chat_server.bodies[1]["seed"] == 5


@pytest.mark.parametrize(
    "event",
    [{"isComposing": True}, pytest.param({"keyCode": 229}, marks=pytest.mark.slow)],
    ids=["composing", "safari"],
)
def test_enter_of_an_input_method_does_not_send(chat: Chat, chat_server: FakeChatServer, event: dict[str, Any]) -> None:
    chat.input.fill("にほん")
    is_handled = chat.page.evaluate(
        """event => !document.getElementById("input").dispatchEvent(
          new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...event }))""",
        event,
    )
    assert not is_handled
    chat.expect(chat.input).to_have_value("にほん")
    chat.ask("日本", "Japan")
    assert [body["messages"][0]["content"] for body in chat_server.bodies] == ["日本"]


@pytest.mark.slow
def test_narrow_screen_has_no_horizontal_scroll(browser: "Browser", chat_server: FakeChatServer) -> None:
    widths = (
        "() => [document.documentElement, document.getElementById('log')].map((n) => n.scrollWidth - n.clientWidth)"
    )
    with full_page(browser, chat_server, viewport=NARROW) as chat:
        assert chat.page.evaluate(widths) == [0, 0]
        for control in chat.page.get_by_role("button").all():
            box = control.bounding_box()
            assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= NARROW["width"])
        chat.button("Settings").click()
        assert chat.page.evaluate(widths) == [0, 0]
        chat.page.keyboard.press("Escape")

        menu = chat.button("Conversations")
        chat.expect(chat.button("Short")).to_be_hidden()
        menu.click()
        chat.expect(menu).to_have_attribute("aria-expanded", "true")
        chat.expect(chat.page.locator("#new")).to_be_focused()
        chat.page.keyboard.press("Escape")
        chat.expect(menu).to_be_focused()
        menu.click()
        chat.button("Short").click()
        chat.expect(chat.answer).to_have_text("Yes")
        chat.expect(chat.button("Short")).to_be_hidden()


@pytest.mark.slow
@pytest.mark.slow
def test_no_motion_where_it_is_not_wanted(browser: "Browser", chat_server: FakeChatServer) -> None:
    with open_chat(browser, chat_server, reduced_motion="reduce") as chat:
        chat.open().send("Go", HOLD)
        chat.expect(chat.page.locator(".waiting")).to_have_css("animation-name", "none")
        chat.button("Stop").click()
        chat_server.wait_for_abort()
