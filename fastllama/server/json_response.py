"""JSON as HTTP responses."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Response

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_bytes(value: Any) -> bytes:
    """A value as JSON in UTF-8. A lone surrogate, which UTF-8 lacks, becomes a question mark."""
    return _ENCODER.encode(value).encode(errors="replace")


class JsonResponse(Response):
    """A value as a JSON response."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(json_bytes(content), status_code, dict(headers or {}))
