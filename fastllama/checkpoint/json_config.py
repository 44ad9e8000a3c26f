"""Checked reading of the small JSON files beside the weights, and short texts for error messages.

`JsonConfig` wraps one JSON object and knows its file, so every error names the file, the field, what was expected and
what was found.
"""

import logging
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

from fastllama import strict_json

logger = logging.getLogger(__name__)

MAX_INTEGER = 2**31 - 1
# Far above any real field, and small enough that products of a few such numbers stay finite.
MAX_NUMBER = 1e30
# The names of all weights are listed before they are compared; this bounds the list if the layer count is wrong.
MAX_LAYERS = 10_000
MAX_NAMES_LISTED = 8


class JsonConfig:
    """A JSON object whose getters check the values that they return. A field that is null counts as absent."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    @classmethod
    def read(cls, path: Path) -> "JsonConfig":
        """The object in a file. ValueError if it is unreadable, not valid JSON, not an object, or has a key twice."""
        return cls(path, strict_json.read_object(path))

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, expected: str) -> ValueError:
        """The error about one field, for the caller to raise."""
        got = f"got {short_repr(self.values[key])}" if self.has(key) else "it is missing"
        return ValueError(f"{self.path}: field {self.full_name(key)!r}: expected {expected}, {got}")

    def full_name(self, key: str) -> str:
        """A field's name for messages, with the names of the objects around it: "rope_scaling.factor"."""
        return self._prefix + key

    def warn(self, message: str) -> None:
        """Log which value is used when fields of this file contradict each other."""
        logger.warning("%s: %s", self.path, message)

    def integer(self, key: str, default: int | None = None, maximum: int = MAX_INTEGER) -> int:
        """An integer from 1 to `maximum`; required if there is no default."""
        value: Any = self.values.get(key)
        if value is None and default is not None:
            return default
        if not _is_integer(value) or not 1 <= value <= maximum:
            raise self.error(key, f"an integer from 1 to {maximum}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A number from 1 / MAX_NUMBER to MAX_NUMBER; required if there is no default."""
        value: Any = self.values.get(key)
        if value is None and default is not None:
            return default
        if not (_is_integer(value) and value <= MAX_INTEGER) and not isinstance(value, float):
            raise self.error(key, "a positive number")
        if not 0 < value <= MAX_NUMBER:  # also false for NaN
            raise self.error(key, "a positive number")
        if value < 1 / MAX_NUMBER:
            raise self.error(key, f"a number of at least {1 / MAX_NUMBER:g}")
        return float(value)

    def number_or_zero(self, key: str) -> float:
        """A positive finite number, or 0, which is also what an absent field gives."""
        value = self.values.get(key)
        return 0.0 if value == 0 and not isinstance(value, bool) else self.number(key, 0.0)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def section(self, key: str) -> "JsonConfig | None":
        """A nested object, or None if it is absent or empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return JsonConfig(self.path, value, f"{self._prefix}{key}.") if value else None

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as null, one integer or a list of integers."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_integer(token) and 0 <= token <= MAX_INTEGER for token in ids):
            raise self.error(key, "a token id or a list of them")
        return tuple(ids)

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Raise ValueError that lists fields outside `known`: they may change what the weights mean."""
        unknown = sorted(set(self.values) - set(known))
        if unknown:
            raise ValueError(f"{self.path}: unknown fields {short_list(unknown)}; known are {', '.join(sorted(known))}")


def short_list(items: Collection[str]) -> str:
    """The first MAX_NAMES_LISTED texts, control characters escaped, and the number of the others."""
    few = ", ".join(short_repr(item).strip("'\"") for item in islice(items, MAX_NAMES_LISTED))
    return few + (f" and {len(items) - MAX_NAMES_LISTED} more" if len(items) > MAX_NAMES_LISTED else "")


def short_repr(value: object, max_chars: int = 200) -> str:
    """repr of a value for an error message, cut to `max_chars`: a hostile file may hold very long ones."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= max_chars else f"{text[:max_chars]}…"


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
