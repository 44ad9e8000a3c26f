"""Regular expressions of a checkpoint's files, matched in bounded time.

Python's `re` tries one way after another, and an expression such as (.+)+! makes it try more ways than anyone can wait
for. The package `regex`, which reads the same expressions, stops at a time limit. It copies what is repeated a number
of times, so these numbers are bounded, too.
"""

import math
import re

import regex

from fastllama.checkpoint.json_config import short_repr

MAX_LENGTH = 1000
MAX_COPIES = 10_000  # the product of all numbers of repetitions
COUNT = re.compile(r"\{(\d*),?(\d*)\}")
MAX_SECONDS = 2.0  # for one name. Real expressions take microseconds


class Expression:
    """A regular expression. ValueError that says what is wrong with one that cannot be read."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"it is longer than {MAX_LENGTH} characters")
        counts = (max(int(number or 1) for number in match.groups()) for match in COUNT.finditer(text))
        if math.prod(max(1, count) for count in counts) > MAX_COPIES:
            raise ValueError(f"its numbers of repetitions together are more than {MAX_COPIES:,}")
        try:
            self._compiled = regex.compile(text)
        except (regex.error, RecursionError) as error:
            raise ValueError(str(error)) from error

    def match(self, name: str) -> bool:
        """Whether it fits the beginning of a name. ValueError if that takes too long."""
        return self._fits(name, whole=False)

    def fullmatch(self, name: str) -> bool:
        """Whether it fits a whole name. ValueError if that takes too long."""
        return self._fits(name, whole=True)

    def _fits(self, name: str, whole: bool) -> bool:
        find = self._compiled.fullmatch if whole else self._compiled.match
        try:
            return find(name, timeout=MAX_SECONDS) is not None
        except TimeoutError as error:
            raise ValueError(
                f"the regular expression {short_repr(self._compiled.pattern)} takes more than {MAX_SECONDS:g} s for "
                f"{short_repr(name)}: name the modules instead"
            ) from error
