"""The small JSON files beside the weights, read without trust.

`JsonConfig` wraps one JSON object and knows its file, so that every error can name the file, the field, what was
expected and what was found.
"""

import logging
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

from fastllama import strict_json

logger = logging.getLogger(__name__)

LARGEST_INTEGER = 2**31 - 1
# Far above any real field, and low enough that products of a few stay finite.
LARGEST_NUMBER = 1e30
# A wrong layer count would otherwise make a list of that many names before it is noticed.
MOST_LAYERS = 10_000
NAMES_LISTED = 8


class JsonConfig:
    """A JSON object whose getters check what they hand out. A field that is null counts as absent."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    @classmethod
    def read(cls, path: Path) -> "JsonConfig":
        """The object in a file; ValueError when it cannot be read, is not JSON, not an object or has a key twice."""
        try:
            values = strict_json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
        except strict_json.ConflictingValues as error:
            raise ValueError(f"{path}: {error}; remove the one that is not meant") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is not valid JSON ({error}); download it again") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {shown(values)}")
        return cls(path, values)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, expected: str) -> ValueError:
        """The complaint about one field, to be raised."""
        got = f"got {shown(self.values[key])}" if self.has(key) else "it is missing"
        return ValueError(f"{self.path}: field {self.name(key)!r}: expected {expected}, {got}")

    def name(self, key: str) -> str:
        """A field's name with those of the objects that it stands in, for messages."""
        return self._prefix + key

    def warn(self, message: str) -> None:
        """Log what is used where fields of this file contradict each other."""
        logger.warning("%s: %s", self.path, message)

    def integer(self, key: str, default: int | None = None, most: int = LARGEST_INTEGER) -> int:
        """A positive integer up to `most`; required when there is no default."""
        value: Any = self.values.get(key)
        if value is None and default is not None:
            return default
        if not _is_integer(value) or not 1 <= value <= most:
            raise self.error(key, f"an integer from 1 to {most}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; required when there is no default."""
        value: Any = self.values.get(key)
        if value is None and default is not None:
            return default
        if not (_is_integer(value) and value <= LARGEST_INTEGER) and not isinstance(value, float):
            raise self.error(key, "a positive number")
        if not 0 < value <= LARGEST_NUMBER:  # false for NaN, too
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def section(self, key: str) -> "JsonConfig | None":
        """A nested object, or None where it is absent or empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return JsonConfig(self.path, value, f"{self._prefix}{key}.") if value else None

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as null, one integer or a list of them."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_integer(token) and 0 <= token <= LARGEST_INTEGER for token in ids):
            raise self.error(key, "a token id or a list of them")
        return tuple(ids)

    def refuse_unknown(self, known: Collection[str]) -> None:
        """ValueError that lists fields nobody reads: they may change what the weights mean."""
        unknown = sorted(set(self.values) - set(known))
        if unknown:
            raise ValueError(f"{self.path}: unknown fields {listing(unknown)}; known are {', '.join(sorted(known))}")


def listing(items: Collection[str]) -> str:
    """The first few of many texts, their control characters escaped, and how many more there are."""
    few = ", ".join(shown(item).strip("'\"") for item in islice(items, NAMES_LISTED))
    return few + (f" and {len(items) - NAMES_LISTED} more" if len(items) > NAMES_LISTED else "")


def shown(value: object, most: int = 200) -> str:
    """A value for an error message: its repr, cut where a hostile file makes it long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}…"


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
