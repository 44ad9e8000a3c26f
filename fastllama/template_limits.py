"""What a chat template may use: CPU time, the size of each value that it makes, and the size of all of them.

A text's size is its number of characters. A list's or dict's is `ITEM` for every element, and the elements' sizes.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError

# CPU time of the thread, so that a busy machine does not shorten it. A real template takes milliseconds.
MAX_SECONDS = 1.0
MAX_SIZE = 2**22
MAX_TOTAL = 2**27
MAX_DEPTH = 64
MAX_BITS = 4096


class Limits:
    """The limits of one rendering. Larger inputs raise them: a template may collect the text in a loop.

    Every method raises SecurityError, with the reason in a few words, when a limit is passed.
    """

    ITEM = 16

    def __init__(self, inputs: Any) -> None:
        self._max_size = float("inf")
        input_size = self.weight(inputs)
        self._max_size = MAX_SIZE + 4 * input_size
        self._total_left = MAX_TOTAL + 256 * input_size
        self._end = time.thread_time() + MAX_SECONDS

    def step(self, size: int = 0) -> None:
        """Count a step of the template, and check the time."""
        self._total_left -= size
        if self._total_left < 0:
            raise SecurityError("it makes too much text or too many values")
        if time.thread_time() > self._end:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} s")

    def need(self, size: float) -> None:
        """Refuse a value of this size, before it is made."""
        if size > self._max_size:
            raise SecurityError(f"it makes a text or list of size {size:.3g}; at most {self._max_size} is allowed")

    def charged(self, value: Any) -> Any:
        """The value, after its own size is counted, without its elements'."""
        if isinstance(value, str):
            self.step(len(value))
        elif isinstance(value, list | tuple | dict):
            self.step(self.ITEM * len(value))
        return value

    def made(self, value: Any) -> Any:
        """The value, after it is counted and measured with all that it holds."""
        self.weight(value)
        return self.charged(value)

    def weight(self, value: Any) -> int:
        """The size of a value with all that it holds, each time that it holds it."""
        total = 0
        level = [value]
        for _ in range(MAX_DEPTH):
            deeper: list[Any] = []
            for one in level:
                if isinstance(one, str):
                    total += len(one)
                elif isinstance(one, list | tuple):
                    total += self.ITEM * len(one)
                    deeper += one
                elif isinstance(one, dict):
                    total += self.ITEM * len(one)
                    deeper += one.keys()
                    deeper += one.values()
                self.need(total)
            if not deeper:
                return total
            level = deeper
        raise SecurityError(f"it nests lists or dicts deeper than {MAX_DEPTH}")

    def check_repeat(self, size: int, count: Any) -> None:
        """Refuse `count` times something of this size. Other types than int are left to the operation itself."""
        if isinstance(count, int):
            self.need(size * count)

    def check_replace(self, text: str, old: str, new: str) -> None:
        """Refuse a replacement whose result is too long."""
        self.need(len(text) + text.count(old) * len(new))

    def check_widths(self, format_text: str) -> None:
        """Refuse a format that holds a large number, which may be a width or a precision."""
        # Ten digits are beyond every limit, and int() of very many is an error of its own.
        self.need(sum(int(digits[:10]) for digits in re.findall("[0-9]+", format_text)))

    def check_percent(self, format_text: str, values: Any) -> None:
        """Refuse `format_text % values` if it may be too long: each field may hold the largest value."""
        self.check_widths(format_text)
        fields = format_text.count("%")
        items = values if isinstance(values, tuple) else values.values() if isinstance(values, dict) else (values,)
        largest = max((self.weight(item) for item in items), default=0)
        if "*" in format_text:  # a width that is a value
            largest = max([largest, *(abs(item) for item in items if isinstance(item, int))])
        self.need(len(format_text) + fields * largest)

    def check_operator(self, operator: str, left: Any, right: Any) -> None:
        """Refuse `left operator right` if the result is too large."""
        if operator == "%" and isinstance(left, str):
            self.check_percent(left, right)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.need(len(left) + len(right))
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple):
                    self.check_repeat(max(self.weight(value), 1), count)
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise SecurityError(f"it computes a number of more than {MAX_BITS} bits")


_limits: ContextVar[Limits] = ContextVar("limits of the template that is rendered")


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Within it, templates are rendered in this thread under `limits`."""
    token = _limits.set(limits)
    try:
        yield
    finally:
        _limits.reset(token)


def current() -> Limits:
    """The limits of the template that this thread renders."""
    return _limits.get()
