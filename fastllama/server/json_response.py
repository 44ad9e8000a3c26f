"""JSON as HTTP responses."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Response

# Line ends for some readers of events, among them Python's str.splitlines. In JSON they can only stand in strings.
LINE_ENDS = {end: f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_bytes(value: Any) -> bytes:
    """A value as one line of JSON in UTF-8. A lone surrogate, which UTF-8 lacks, becomes a question mark."""
    text = _ENCODER.encode(value)
    for end, escaped in LINE_ENDS.items():
        text = text.replace(end, escaped)
    return text.encode(errors="replace")


class JsonResponse(Response):
    """A value as a JSON response."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(json_bytes(content), status_code, dict(headers or {}))
