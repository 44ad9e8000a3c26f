"""The parts of an answer: its text, and the calls of tools in it, as they come."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class TextPart:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """The begin of a call. Its arguments follow."""

    index: int  # of the call in the answer
    id: str
    name: str  # of the function


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


Part = TextPart | CallBegin | CallArguments


class AnswerParser(Protocol):
    """Splits the text of one answer, which comes in pieces, into parts."""

    @property
    def has_text(self) -> bool:
        """Whether the answer may have text, beside calls or instead of them."""

    @property
    def has_whole_calls(self) -> bool:
        """Whether there were calls, and the arguments of the last one are complete."""

    def push(self, text: str) -> list[Part]:
        """The parts that this piece completes."""

    def finish(self) -> list[Part]:
        """The parts that were held back: the answer has ended."""


class PlainParser:
    """The parser of answers without calls: all is text."""

    has_text, has_whole_calls = True, False

    def push(self, text: str) -> list[Part]:
        """The text as it is."""
        return [TextPart(text)] if text else []

    def finish(self) -> list[Part]:
        """Nothing was held back."""
        return []
