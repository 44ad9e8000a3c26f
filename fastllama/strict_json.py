"""A JSON reader that raises an error for a key with two different values, where `json` keeps the last.

It can also refuse what `json` reads and others cannot write again: numbers that are not finite, and values that are
nested almost as deeply as the stack allows.
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 200  # lists and objects within each other, in what others send: far from what any stack allows


class ConflictingValues(ValueError):
    """A key appears twice in one object, with different values."""


def loads(text: str | bytes, *, allow_nan: bool = True, max_depth: int | None = None) -> Any:
    """`json.loads`, but a key with two different values raises ConflictingValues. The same value twice is allowed.

    Without allow_nan, NaN, Infinity and numbers beyond a float's range, such as 1e999, raise ValueError. A value with
    more than max_depth lists and objects within each other raises RecursionError.
    """
    numbers: dict[str, Any] = {} if allow_nan else {"parse_float": _finite, "parse_constant": _refuse}
    value = json.loads(text, object_pairs_hook=_object, **numbers)
    if max_depth is not None and _may_be_deeper(text, max_depth) and _is_deeper(value, max_depth):
        raise RecursionError(f"more than {max_depth} lists and objects are within each other")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. ValueError if it is unreadable, not valid JSON, not an object, or has a key twice."""
    try:
        values = loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: does not exist; download it, because the files beside it need it") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ConflictingValues as error:
        raise ValueError(f"{path}: {error}; remove the one that is not meant") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text:.40} is not a finite number")


def _may_be_deeper(text: str | bytes, most: int) -> bool:
    """Whether there are enough brackets, which is known at once."""
    if isinstance(text, str):
        return text.count("[") + text.count("{") > most
    return text.count(b"[") + text.count(b"{") > most  # in UTF-16, too, these bytes are in every bracket


def _is_deeper(value: Any, most: int) -> bool:
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(most):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, list | dict)]
        if not level:
            return False
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        first: dict[str, Any] = {}
        for key, value in pairs:
            known = first.setdefault(key, value)
            if type(known) is not type(value) or known != value:
                raise ConflictingValues(f"{key!r:.80} appears twice, as {known!r:.80} and as {value!r:.80}")
    return values
