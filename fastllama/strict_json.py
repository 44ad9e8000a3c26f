"""A JSON reader that raises an error for a key with two different values, where `json` keeps the last."""

import json
from typing import Any


class ConflictingValues(ValueError):
    """A key appears twice in one object, with different values."""


def loads(text: str | bytes) -> Any:
    """`json.loads`, but a key with two different values raises ConflictingValues. The same value twice is allowed."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        first: dict[str, Any] = {}
        for key, value in pairs:
            known = first.setdefault(key, value)
            if type(known) is not type(value) or known != value:
                raise ConflictingValues(f"{key!r:.80} appears twice, as {known!r:.80} and as {value!r:.80}")
    return values
