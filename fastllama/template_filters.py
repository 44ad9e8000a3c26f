"""The filters, functions and methods that a chat template may use, each with a check of what it makes."""

import functools
import inspect
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.utils import Namespace

from fastllama.template_limits import Limits, current

# Filters of HTML and of rare use whose time or size is not bounded by their arguments.
REMOVED_FILTERS = ("urlize", "xmlattr", "striptags", "wordwrap", "pprint", "filesizeformat", "urlencode")
TEXT_METHODS = frozenset(
    [
        *("capitalize", "casefold", "lower", "swapcase", "title", "upper", "center", "ljust", "rjust", "zfill"),
        *("count", "endswith", "find", "index", "rfind", "rindex", "startswith", "format", "format_map", "join"),
        *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"),
        *("isprintable", "isspace", "istitle", "isupper", "lstrip", "rstrip", "strip", "removeprefix", "removesuffix"),
        *("partition", "replace", "rpartition", "rsplit", "split", "splitlines"),
    ]
)
# Methods whose time is the product of the lengths of the text and of the argument.
SLOW_TEXT_METHODS = frozenset(["lstrip", "rstrip", "strip", "rfind", "rindex", "rpartition", "rsplit"])
MAX_SOUGHT_CHARS = 1000
MAX_DATE_FORMAT_CHARS = 1000
MAX_RANGE = 100_000


def step(chars: int) -> bool:
    current().step(chars)
    return True


def made(value: Any) -> Any:
    return current().made(value)


def sliced(value: Any) -> Any:
    return current().charged(value)


def joined(values: list[Any]) -> str:
    limits = current()
    limits.need(limits.weight(values))
    return str(limits.made("".join(map(str, values))))


@jinja2.pass_context
def finalize(context: Any, value: Any) -> Any:
    """What `{{ }}` prints. It takes the context so that Jinja does not call it while it compiles."""
    return current().made(value)


def limited_filter(function: Callable[..., Any], check: Callable[..., None] | None) -> Callable[..., Any]:
    """The filter with a check of its arguments and a measure of its result."""
    if getattr(function, "jinja_async_variant", False):
        function = function.__wrapped__  # type: ignore[attr-defined]
    signature = inspect.signature(function) if check else None

    @functools.wraps(function)  # keeps the mark of filters that take the environment
    def filter_with_limits(*args: Any, **kwargs: Any) -> Any:
        limits = current()
        limits.step()
        if check and signature:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            check(limits, bound.arguments)
        return limits.made(function(*args, **kwargs))

    return filter_with_limits


def _check_sum(limits: Limits, arguments: dict[str, Any]) -> None:
    if not isinstance(arguments["start"], int | float):
        raise SecurityError("the filter sum adds numbers only")


def _check_indent(limits: Limits, arguments: dict[str, Any]) -> None:
    width = arguments["width"]
    limits.check_repeat(len(str(arguments["s"]).splitlines()) + 1, len(width) if isinstance(width, str) else width)


def _check_format(limits: Limits, arguments: dict[str, Any]) -> None:
    limits.check_percent(str(arguments["value"]), arguments["kwargs"] or arguments["args"])


def _check_trim(limits: Limits, arguments: dict[str, Any]) -> None:
    _check_sought("trim", arguments["chars"])


def _check_int(limits: Limits, arguments: dict[str, Any]) -> None:
    _check_sought("int", arguments["value"])  # hexadecimal text has no limit in Python


def _check_sought(name: str, value: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_SOUGHT_CHARS:
        raise SecurityError(f"calls {name} with a text of more than {MAX_SOUGHT_CHARS} characters")


FILTER_CHECKS: dict[str, Callable[[Limits, dict[str, Any]], None]] = {
    "batch": lambda limits, given: limits.check_repeat(16, given["linecount"]),
    "center": lambda limits, given: limits.check_repeat(1, given["width"]),
    "format": _check_format,
    "indent": _check_indent,
    "int": _check_int,
    "replace": lambda limits, given: limits.check_replace(str(given["s"]), str(given["old"]), str(given["new"])),
    "round": lambda limits, given: limits.check_operator("**", 10, given["precision"]),
    "slice": lambda limits, given: limits.check_repeat(16, given["slices"]),
    "sum": _check_sum,
    "trim": _check_trim,
}


def checked_text_call(
    limits: Limits, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments for a method of a text. SecurityError if it is not allowed or its result would be too long."""
    if name not in TEXT_METHODS:
        raise SecurityError(f"calls the method {name} of a text, which templates may not")
    if name in ("center", "ljust", "rjust", "zfill") and args:
        limits.check_repeat(1, args[0])
    if name == "replace" and len(args) >= 2:
        limits.check_replace(text, str(args[0]), str(args[1]))
    if name in SLOW_TEXT_METHODS:
        for value in (*args, *kwargs.values()):
            _check_sought(name, value)
    if name == "join" and len(args) == 1:
        items = list(args[0])
        limits.need(limits.weight(items) + len(text) * len(items))
        return (items,)
    return args


@jinja2.pass_environment
def join(environment: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    limits = current()
    items = list(value if attribute is None else map(make_attrgetter(environment, attribute), value))
    limits.need(limits.weight(items) + len(str(d)) * len(items))
    return str(d).join(map(str, items))


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """transformers' filter: unlike Jinja's it escapes no HTML."""
    limits = current()
    limits.weight(value)
    limits.check_repeat(1, len(indent) if isinstance(indent, str) else indent or 0)
    if separators is not None:
        limits.need(limits.weight(separators))
    chunks, total = [], 0
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for chunk in encoder.iterencode(value):
        chunks.append(chunk)
        total += len(chunk)
        limits.need(total)
    return "".join(chunks)


def counted_range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise SecurityError(f"range of {len(numbers)} numbers; at most {MAX_RANGE} are allowed")
    limits = current()
    limits.step(limits.ITEM * len(numbers))
    return numbers


def raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def strftime_now(format: str) -> str:
    if len(format) > MAX_DATE_FORMAT_CHARS:
        raise SecurityError(f"strftime_now of a format of more than {MAX_DATE_FORMAT_CHARS} characters")
    return datetime.now().strftime(format)


class TemplateNamespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore, and printed without its values."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without self, so that a template may use that name
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"sets {name!r:.80} of a namespace; names with a leading underscore are not allowed")
