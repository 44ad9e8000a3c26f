"""Markdown on the chat page: what it makes of texts, of texts that grow, and of texts that attack the page."""

import re
from typing import Any

import pytest

from tests.support.chat_page import Chat
from tests.support.fake_chat_server import HOLD, FakeChatServer
from tests.support.tiers import parameters
from tests.support.timeouts import HANG_SECONDS

A = 'target="_blank" rel="noopener noreferrer"'
# (text, the HTML that shows it)
CASES = {
    "paragraphs": ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    "emphasis": (
        "**bold** *italic* ***both*** __b__ _i_ ~~gone~~",
        "<p><strong>bold</strong> <em>italic</em> <strong><em>both</em></strong>"
        " <strong>b</strong> <em>i</em> <del>gone</del></p>",
    ),
    "nested emphasis": ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    "no emphasis": (
        r"2 * 3 * 4, snake_case_name, **open, \*escaped\*, ____",
        "<p>2 * 3 * 4, snake_case_name, **open, *escaped*, ____</p>",
    ),
    "crossed emphasis": ("*a **b* c", "<p><em>a **b</em> c</p>"),
    "code": (
        "`x = *a*` and ``a ` b`` and **`*args`**, an `open one",
        "<p><code>x = *a*</code> and <code>a ` b</code> and <strong><code>*args</code></strong>, an `open one</p>",
    ),
    "headings": ("# One\n#### Four #\n#no heading", "<h3>One</h3><h6>Four</h6><p>#no heading</p>"),
    "list": ("- a\n- b\n  more\n* c", "<ul><li><p>a</p></li><li><p>b<br>more</p></li><li><p>c</p></li></ul>"),
    "numbered list": ("3. a\n\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
    "nested lists": (
        "1. a\n   - b\n     - c\n\n   second\n2. d",
        '<ol start="1"><li><p>a</p><ul><li><p>b</p><ul><li><p>c</p></li></ul></li></ul><p>second</p></li>'
        "<li><p>d</p></li></ol>",
    ),
    "year": ("It was in\n1984. Not a list", "<p>It was in<br>1984. Not a list</p>"),
    "quote": ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote><p>c</p>"),
    "rule": ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    "table": (
        "| a | b |\n|:-:|--:|\n| `x` | 1 \\| 2 |\nend",
        '<div class="wide"><table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead><tbody>'
        '<tr><td class="center"><code>x</code></td><td class="right">1 | 2</td></tr></tbody></table></div><p>end</p>',
    ),
    "links": (
        "[a *b*](https://example.com/x_(y)) <https://example.com> https://example.com/a_b_c. mailto:a@example.com",
        f'<p><a href="https://example.com/x_(y)" {A}>a <em>b</em></a>'
        f' <a href="https://example.com/" {A}>https://example.com</a>'
        f' <a href="https://example.com/a_b_c" {A}>https://example.com/a_b_c</a>.'
        f' <a href="mailto:a@example.com" {A}>mailto:a@example.com</a></p>',
    ),
    "link of a link": (
        "[https://example.com](https://example.com)",
        f'<p><a href="https://example.com/" {A}>https://example.com</a></p>',
    ),
    "image": ("![a cat](https://example.com/cat.png)", f'<p><a href="https://example.com/cat.png" {A}>a cat</a></p>'),
    "line breaks in HTML": ("a<br>b<br/>c", "<p>a<br>b<br>c</p>"),
    "entities": ("a &amp; b <b>c</b>", "<p>a &amp;amp; b &lt;b&gt;c&lt;/b&gt;</p>"),
}
WHOLE = "\n\n".join(text for text, _ in CASES.values()) + (
    "\n\n```python\ndef f(x):\n\n    return x  # <b>\n```\n\n"
    "1. item\n   ~~~\n   code in it\n   ~~~\n2. ````md\n   ```\n   ````\n\nend"
)
RENDER = "text => { const box = make('div'); new Markdown(box).update(text, false); return box.innerHTML; }"
ATTACKS = {
    "image": '<img src=x onerror="window.attacked = 1">',
    "script": "<script>window.attacked = 1</script>",
    "svg": "<svg onload=window.attacked=1><a xlink:href=javascript:alert(1)>x</a></svg>",
    "link": "[click](javascript:window.attacked=1) [tab](java\tscript:alert(1)) [case](JaVaScRiPt:alert(1))",
    "data link": "[a](data:text/html,<script>window.attacked=1</script>) [b](vbscript:x) [c](//evil.example)",
    "autolink": "<javascript:window.attacked=1> javascript:window.attacked=1",
    "attribute": '[a](https://example.com/"onmouseover="window.attacked=1) ![x"onerror="attacked](https://x.y/"z)',
    "code": "```html\n</code></pre><script>window.attacked = 1</script>\n```\n`<img src=x onerror=window.attacked=1>`",
    "language": '```"><img/src=x/onerror=window.attacked=1>\nx\n```',
    "table": "|<img src=x onerror=window.attacked=1>|b|\n|--|--|\n|<script>attacked=1</script>|[x](javascript:x)|",
}
MANY, LONG = 50_000, 2_000_000  # of nodes; of characters, whose square is more steps than a browser makes in a test
SLOW_TEXTS = {
    "stars": "*a " * MANY,
    "both stars": "**a *b " * MANY,
    "backticks": "".join("`" * (1 + i % 50) + "x" for i in range(MANY)),
    "brackets": "[" * LONG,
    "brackets in brackets": "[" + "[a]" * MANY,
    "long labels": ("[" + "a" * 199) * (LONG // 200),
    "links": "[a](" * MANY,
    "parentheses": "[a](" + "(" * LONG,
    "spaces before a target": "[a](" + " " * LONG + "x",
    "spaces after a target": "[a](b" + " " * LONG + "x",
    "spaces after a title": '[a](b "c"' + " " * LONG + "x",
    "punctuation of an address": "https://" + "." * LONG + "a",
    "spaces in a line": "a" + " " * LONG + "x",
    "code": "` " + "x" * LONG + "`",
    "code of spaces": "`" + " " * LONG + "`",
    "tildes": "~" * LONG + "`",
    "spaces after a fence": "```" + " " * LONG + "`",
    "fences": "`" * LONG + "x`",
    "quotes": "> " * LONG + "x",
    "lists": "- " * (LONG // 2) + "x",
    "spaces of a heading": "#" + " " * LONG + "x",
    "line ends of a heading": "#" + " " * LONG + "x\ry",
    "signs of a heading": "# a" + " #" * LONG + "x",
    "line ends of an item": "-" + " " * LONG + "x\ry",
    "rules": "- " * LONG + "\n" + "-" * LONG + "x",
    "table": "|" * MANY + "\n" + "|-" * MANY + "x",
    "wide table": "|a" * 3 * MANY + "|\n" + "|-" * 3 * MANY + "|",
    "items": "- a\n\n" * MANY,
    "paragraphs in a quote": "> a\n>\n" * 3 * MANY,
}


@pytest.mark.parametrize("name", CASES)
def test_text_becomes_html(shared: Chat, name: str) -> None:
    text, html = CASES[name]
    assert re.sub(r' class=""', "", shared.page.evaluate(RENDER, text)) == html


@pytest.mark.slow
def test_code_block_has_its_language_and_a_button(chat: Chat) -> None:
    chat.ask("Code?", "```python\nif x:\n\n    <b>\n```")
    block = chat.answer.locator(".code")
    chat.expect(block.locator("code")).to_have_text("if x:\n\n    <b>")
    chat.expect(block.locator("figcaption span")).to_have_text("python")
    chat.expect(block.get_by_role("button", name="Copy code")).to_be_visible()


def test_grown_text_is_shown_like_a_whole_one(shared: Chat) -> None:
    """Character by character, and in pieces of other lengths: the end is the same."""
    differing = shared.page.evaluate(
        """text => [1, 2, 3, 7, 50].filter((step) => {
          const box = document.createElement("div"), whole = document.createElement("div");
          const growing = new Markdown(box);
          for (let end = step; end < text.length; end += step) growing.update(text.slice(0, end), true);
          growing.update(text, false);
          new Markdown(whole).update(text, false);
          return box.innerHTML !== whole.innerHTML || whole.childElementCount < 25;
        })""",
        WHOLE,
    )
    assert differing == []


@pytest.mark.parametrize(
    "text", ["so **bold** end", "*a* b", "~~a~~ b", "`code` b", "[a](https://example.com) b", "- **a**"]
)
def test_markers_do_not_flicker(shared: Chat, text: str) -> None:
    """While emphasis, code or a link is incomplete, its markers are not shown as text."""
    shown: list[str] = shared.page.evaluate(
        """text => {
          const box = document.createElement("div"), growing = new Markdown(box);
          return Array.from(text, (_, at) => (growing.update(text.slice(0, at + 1), true), box.textContent));
        }""",
        text,
    )
    assert not any(re.search(r"[*~`(]", one) for one in shown)
    assert all(one.replace("[", "").replace("]", "") in shown[-1] for one in shown)


def test_finished_blocks_stay_the_same_nodes(shared: Chat) -> None:
    """Blocks before the last two are not drawn again, and neither is a growing block of code."""
    result: dict[str, Any] = shared.page.evaluate(
        """() => {
          const box = document.createElement("div"), growing = new Markdown(box);
          growing.update("one\\n\\ntwo\\n\\n```py\\nx", true);
          const parts = () => [...box.children, box.querySelector("button"), box.querySelector("code").firstChild];
          const before = parts();
          growing.update("one\\n\\ntwo\\n\\n```py\\nx = 1", true);
          const after = parts();
          return { same: before.map((node, index) => node === after[index]), shown: after.at(-1).data };
        }"""
    )
    assert result == {"same": [True] * 5, "shown": "x = 1"}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_text(shared: Chat, name: str) -> None:
    found: dict[str, Any] = shared.page.evaluate(
        """text => {
          const box = document.body.appendChild(document.createElement("div")), allowed = /^(https?|mailto):/;
          const growing = new Markdown(box), elements = new Set(), attributes = new Set(), links = [];
          for (let end = 1; end <= text.length + 1; end++) {
            growing.update(text.slice(0, end), end <= text.length);
            for (const node of box.querySelectorAll("*")) {
              elements.add(node.localName);
              for (const { name } of node.attributes) attributes.add(name);
              if (node.href) links.push(node.href);
            }
          }
          box.remove();
          const bad = links.filter((href) => !allowed.test(href));
          return { elements: [...elements], attributes: [...attributes], links: bad };
        }""",
        ATTACKS[name],
    )
    assert found["links"] == []
    assert not {"script", "img", "svg", "iframe", "object"} & set(found["elements"])
    assert set(found["attributes"]) <= {"class", "href", "target", "rel", "type", "aria-label", "start"}
    assert shared.page.evaluate("window.attacked") is None


@pytest.mark.slow
def test_attacks_everywhere_else_are_text(chat: Chat) -> None:
    """In messages, titles, system prompts and what comes from the server."""
    attack = ATTACKS["image"]
    chat.ask(attack, attack, {"error": {"message": attack}})
    chat.expect(chat.error).to_contain_text(attack)
    chat.expect(chat.page.locator("h1")).to_have_text(attack)
    chat.page.reload()
    chat.expect(chat.answer).to_have_text(attack)
    assert chat.page.locator("img").count() == 0
    assert chat.page.evaluate("window.attacked") is None


@pytest.mark.parametrize("name", parameters({name: name for name in SLOW_TEXTS}, list(SLOW_TEXTS)[::14]))
def test_text_that_is_made_to_be_slow_ends(chat: Chat, name: str) -> None:
    """Work that grows with the square of a text's length would not end while the test waits."""
    for growing in (False, True):
        chat.page.evaluate(
            """([text, growing]) => {
              window.shown = null;
              setTimeout(() => {
                const box = document.createElement("div");
                new Markdown(box).update(text, growing);
                window.shown = box.textContent.length;
              });
            }""",
            [SLOW_TEXTS[name], growing],
        )
        chat.page.wait_for_function("window.shown !== null", timeout=HANG_SECONDS * 1000)
        assert chat.page.evaluate("window.shown") > 0


@pytest.mark.slow
def test_markdown_is_drawn_while_it_comes(chat: Chat, chat_server: FakeChatServer) -> None:
    chat.send("Go", "A **bo", HOLD, "ld** word\n\n| a |", HOLD, "\n|--|\n| 1 |")
    chat.expect(chat.answer.locator("strong")).to_have_text("bo")
    chat_server.go_on()
    chat.expect(chat.answer.locator("strong")).to_have_text("bold")
    chat.expect(chat.answer.locator("th")).to_have_text("a")
    chat_server.go_on()
    chat.expect(chat.answer.locator("td")).to_have_text("1")
