"""JSON in which a key that stands twice with two values is an error, not the last of them."""

import json
from typing import Any


class TwoValues(ValueError):
    """A key of one object has two different values."""


def loads(text: str | bytes) -> Any:
    """What `json.loads` returns and raises; TwoValues where a key has two. The same value twice is harmless."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        first: dict[str, Any] = {}
        for key, value in pairs:
            known = first.setdefault(key, value)
            if type(known) is not type(value) or known != value:
                raise TwoValues(f"{key!r:.80} stands there twice, as {known!r:.80} and as {value!r:.80}")
    return values
