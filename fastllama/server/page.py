"""The page to chat in: one file, which may load nothing from elsewhere."""

import base64
import functools
import hashlib
import re
from importlib import resources

from fastapi import Response

PAGE = "page.html"
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page_response() -> Response:
    """The page, with a policy that lets it run its own script and speak to its own server only."""
    page, policy = _page_and_policy()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


@functools.cache
def _page_and_policy() -> tuple[bytes, str]:
    page = resources.files("fastllama.server").joinpath(PAGE).read_text(encoding="utf-8")
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(hashes["script"]),
        "style-src": " ".join(hashes["style"]),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page.encode(), "; ".join(f"{name} {value}" for name, value in policy.items())
