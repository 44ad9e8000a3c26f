"""Regular expressions of a checkpoint's files, matched in bounded time.

Python's matching tries one way after another, and an expression such as (.+)+! makes it try more ways than anyone can
wait for. Here a part of an expression gives, for a place in a text, every place where it can end, and remembers them:
at most as many steps as the expression's length times the square of the text's.

Read is what such files use: characters and their classes, groups, alternatives, repetition, anchors, looking ahead.
"""

import functools
import re
from collections.abc import Callable

MAX_LENGTH = 1000
MAX_DEPTH = 20  # of groups
MAX_COUNT = 100  # in {…}
UNLIMITED = 2**31
# In this order: an escaped character, a class, the beginning of a group, a repetition, and any other character.
TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?.)?|(?:[*+?]|\{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\})\??|.", re.DOTALL
)
REPETITION = re.compile(r"([*+?])\??|\{([0-9]*)(,?)([0-9]*)\}\??")
SIGNS = {"*": (0, UNLIMITED), "+": (1, UNLIMITED), "?": (0, 1)}

Ends = Callable[[str, int], frozenset[int]]  # of a part: (text, where it begins) -> where it may end


class Expression:
    """A regular expression with Python's meaning. ValueError that says what is wrong with one that is not read."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"it is longer than {MAX_LENGTH} characters")
        try:
            self._ends = _Reader(TOKEN.findall(text)).whole()
        except re.error as error:
            raise ValueError(str(error)) from error

    def match(self, text: str) -> bool:
        """Whether it fits the beginning of a text."""
        return bool(self._ends(text, 0))

    def fullmatch(self, text: str) -> bool:
        """Whether it fits a whole text."""
        return len(text) in self._ends(text, 0)


class _Reader:
    """Reads the tokens of an expression."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def whole(self) -> Ends:
        part = self._alternatives()
        if self._next is not None:
            raise ValueError("it has a ) without a (")
        return part

    @property
    def _next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _takes(self, token: str) -> bool:
        """Whether this token is the next, which is then passed."""
        is_next = self._next == token
        self._at += is_next
        return is_next

    def _alternatives(self) -> Ends:
        parts = [self._sequence()]
        while self._takes("|"):
            parts.append(self._sequence())
        return functools.lru_cache(lambda text, at: frozenset().union(*(part(text, at) for part in parts)))

    def _sequence(self) -> Ends:
        parts: list[Ends] = []
        while self._next not in (None, "|", ")"):
            parts.append(self._repeated(self._one()))

        def ends(text: str, at: int) -> frozenset[int]:
            reached = frozenset({at})
            for part in parts:
                reached = _after(part, text, reached)
            return reached

        return ends

    def _one(self) -> Ends:
        """A group, a character, or an anchor."""
        token = self._tokens[self._at]
        self._at += 1
        if not token.startswith("("):
            if token[0] == "\\" and token[1:].isdigit():
                raise ValueError(f"{token} is not read here")
            return _single(re.compile(token))
        if token not in ("(", "(?:", "(?=", "(?!"):
            raise ValueError(f"groups that begin with {token} are not read here")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"it has groups in more than {MAX_DEPTH} others")
        inner = self._alternatives()
        if not self._takes(")"):
            raise ValueError("it has a ( without a )")
        self._depth -= 1
        return _looking_ahead(inner, wanted=token == "(?=") if token in ("(?=", "(?!") else inner

    def _repeated(self, part: Ends) -> Ends:
        found = REPETITION.fullmatch(self._next or "")
        if found is None:
            return part
        self._at += 1
        sign, least, comma, most = found.groups()
        if sign:
            return _repetition(part, *SIGNS[sign])
        counts = int(least or 0), int(most or UNLIMITED) if comma else int(least)
        if counts[0] > MAX_COUNT or MAX_COUNT < counts[1] != UNLIMITED or counts[0] > counts[1]:
            raise ValueError(f"{found[0]} is not a repetition of at most {MAX_COUNT} times")
        return _repetition(part, *counts)


def _after(part: Ends, text: str, starts: frozenset[int]) -> frozenset[int]:
    """Where a part may end that begins at one of these places."""
    return frozenset(end for start in starts for end in part(text, start))


def _single(pattern: re.Pattern[str]) -> Ends:
    """A character or an anchor."""

    def ends(text: str, at: int) -> frozenset[int]:
        found = pattern.match(text, at)
        return frozenset({found.end()} if found else ())

    return ends


def _looking_ahead(part: Ends, *, wanted: bool) -> Ends:
    return lambda text, at: frozenset({at} if bool(part(text, at)) is wanted else ())


def _repetition(part: Ends, least: int, most: int) -> Ends:
    @functools.lru_cache
    def ends(text: str, at: int) -> frozenset[int]:
        new = frozenset({at})
        for _ in range(least):
            new = _after(part, text, new)
        found = new
        for _ in range(min(most - least, len(text))):  # each round but the last finds a new place
            new = _after(part, text, new) - found
            found |= new
        return found

    return ends
