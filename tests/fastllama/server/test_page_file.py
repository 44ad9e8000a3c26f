"""The file of the chat page, without a browser: it is small, whole, and needs nothing from elsewhere."""

import re
from html.parser import HTMLParser

from fastllama.server.page import PAGE, read_page

MAX_LINES = 1240
MAX_FUNCTION_LINES = 30
MAX_BYTES = 60_000  # it is sent uncompressed


class Elements(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_is_small() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES and len(text.encode()) <= MAX_BYTES
    script = text.split("<script>")[1]
    functions = re.findall(r"^(?:async )?function.*?^}$", script, re.MULTILINE | re.DOTALL)
    assert len(functions) > 50
    assert [function.split("\n")[0] for function in functions if function.count("\n") >= MAX_FUNCTION_LINES] == []


def test_page_needs_nothing_from_elsewhere() -> None:
    elements = Elements(PAGE.read_text(encoding="utf-8")).found
    tags = [tag for tag, _ in elements]
    assert tags.count("script") == tags.count("style") == 1
    assert not {"img", "iframe", "object", "embed", "base"} & set(tags)
    addresses = [value for _, attributes in elements for name in ("src", "href") if (value := attributes.get(name))]
    assert all(address.startswith(("data:image/svg+xml,", "#")) for address in addresses)
    style = PAGE.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_page_runs_no_text() -> None:
    """No handlers or styles in attributes, which the policy forbids, and nothing that parses HTML or runs a string."""
    text = PAGE.read_text(encoding="utf-8")
    attributes = {name for _, attributes in Elements(text).found for name in attributes}
    assert [name for name in attributes if name.startswith("on") or name == "style"] == []
    script = text.split("<script>")[1]
    parsers = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|setHTML|srcdoc"
    )
    assert re.findall(rf"{parsers}|\beval\(|new Function\(|import\(", script) == []


def test_policy_allows_this_page_only() -> None:
    body, headers = read_page()
    assert body == PAGE.read_bytes() and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", policy[name]) for name in ("script-src", "style-src"))
    assert policy["script-src"] != policy["style-src"]
