"""Splits an answer's text, as it comes, into text and calls of tools."""

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import regex

from fastllama.openai_api.answer_parts import CallArguments, CallBegin, Part, TextPart
from fastllama.openai_api.call_formats import CallPatterns

WHITE_SPACE = " \n\r\t"
ID_PREFIX = "call_"
ID_CHARS = 24


@dataclass
class Call:
    """A call, as far as it has come."""

    id: str
    name: str
    arguments: str = ""


def joined(parts: Iterable[Part]) -> tuple[str, list[Call]]:
    """The text and the calls of an answer."""
    text, calls = "", dict[int, Call]()
    for part in parts:
        if isinstance(part, TextPart):
            text += part.text
        elif isinstance(part, CallBegin):
            calls[part.index] = Call(part.id, part.name)
        else:
            calls[part.index].arguments += part.text
    return text, list(calls.values())


class CallParser:
    """The parser of answers with calls. White space between text and a call, and after a call, belongs to neither."""

    def __init__(self, patterns: CallPatterns, has_text: bool = True) -> None:
        """has_text: whether the answer may have text. If not, all that is no call is a piece of one that was cut."""
        self.has_text = has_text
        self._trigger, self._first = regex.compile(patterns.trigger), regex.compile(patterns.first)
        self._following = regex.compile(patterns.following or "(?!)")
        self._end = regex.compile(patterns.end)
        self._is_anywhere = patterns.is_anywhere
        self._held = ""  # what is not known to be text or a part of a call
        self._parts: list[Part] = []
        self._n_calls = 0
        self._is_after_call = False
        self._object = _ObjectEnd()
        self._state: Callable[[], bool] = self._read_text

    @property
    def has_whole_calls(self) -> bool:
        """Whether there were calls, and the arguments of the last one are complete."""
        return self._n_calls > 0 and self._state != self._read_arguments

    def push(self, text: str) -> list[Part]:
        """The parts that this piece completes."""
        self._held += text
        while self._held and self._state():
            pass
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """The text that was held back. Of a call that was cut before its arguments nothing is left."""
        is_text = self._state == self._read_text and not self._trigger.match(self._held)
        if is_text:
            self._add_text(self._held)
        self._held = ""
        parts, self._parts = self._parts, []
        return parts

    # Each state reads what it can, and tells whether the next one has something to read.

    def _read_text(self) -> bool:
        find = self._first.search if self._is_anywhere else self._first.match
        found = find(self._held, partial=True)
        begin = len(self._held) if found is None else found.start()
        self._add_text(self._held[:begin])
        self._held = self._held[begin:]
        if found is None:
            if not self._is_anywhere:
                self._state = self._read_rest
            return False
        return not found.partial and self._begin_call(found["name"], found.end() - begin)

    def _read_rest(self) -> bool:
        self._add_text(self._held)
        self._held = ""
        return False

    def _read_arguments(self) -> bool:
        end = self._object.end(self._held)
        self._parts.append(CallArguments(self._n_calls - 1, self._held[:end]))
        self._held = self._held[end:]
        if self._object.is_complete:
            self._state = self._read_end
        return True

    def _read_end(self) -> bool:
        following = self._following.match(self._held, partial=True)
        if following is not None and not following.partial:
            return self._begin_call(following["name"], following.end())
        end = self._end.match(self._held, partial=True)
        if end is None or end.partial:
            if following is not None or end is not None:
                return False
            self._state = self._read_text if self._is_anywhere else self._read_rest
            return True
        self._held = self._held[end.end() :]
        self._is_after_call = True
        self._state = self._read_text if self._is_anywhere else self._read_rest
        return True

    def _begin_call(self, name: str, end: int) -> bool:
        """A call whose arguments begin with the character before `end`."""
        self._parts.append(CallBegin(self._n_calls, f"{ID_PREFIX}{uuid.uuid4().hex[:ID_CHARS]}", name))
        self._n_calls += 1
        self._held = self._held[end - 1 :]
        self._object = _ObjectEnd()
        self._state = self._read_arguments
        return True

    def _add_text(self, text: str) -> None:
        if self._is_after_call:
            text = text.lstrip(WHITE_SPACE)
        if text and self.has_text:
            self._is_after_call = False
            self._parts.append(TextPart(text))


class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = self.is_complete = False

    def end(self, text: str) -> int:
        """How much of the text belongs to the object."""
        for place, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_complete = True
                    return place + 1
        return len(text)
