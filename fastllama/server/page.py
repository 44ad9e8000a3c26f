"""The page at `/`, page.html, and the headers that it is sent with."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).resolve().with_name("page.html")


def read_page() -> tuple[bytes, dict[str, str]]:
    """The page as UTF-8, and its headers. They let a browser run and load what the file holds, and nothing else."""
    text = PAGE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(text, "script"),
        "style-src": _hash(text, "style"),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # a new version of the server has a new page
    }
    return text.encode(), headers


def _hash(text: str, element: str) -> str:
    """What a policy calls an inline script or style: the hash of the text between its tags."""
    (content,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
