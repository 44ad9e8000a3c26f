"""Reads the lines of a batch, in the field names of OpenAI's batch files."""

import contextlib
import json
import os
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from fastllama import strict_json
from fastllama.chat_format import Formatter
from fastllama.openai_api.requests import ApiRequest, chat_request, completion_request

STDIN = "-"
LINE_FIELDS = ("custom_id", "method", "url", "body")
METHOD = "POST"
URLS = COMPLETIONS, CHATS = ("/v1/completions", "/v1/chat/completions")
READ_BYTES = 65536
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BadLine(ValueError):
    """A line that is no request."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class BatchLine:
    """One line. `number` counts from 1."""

    number: int
    custom_id: str | None = None  # None if there is none
    content: dict[str, Any] | None = None
    error: BadLine | None = None  # what is wrong with it

    def request(self, formatter: Formatter) -> ApiRequest:
        """What the line asks for. Raises BadLine, or InvalidRequest for its body. formatter: the model's."""
        if self.error is not None:
            raise self.error
        content = self.content or {}
        if unknown := [name for name in content if name not in LINE_FIELDS]:
            raise BadLine(f"{unknown[0]!r} is not a field of a line: it has {', '.join(LINE_FIELDS)}", "invalid_line")
        if content.get("method", METHOD) != METHOD:
            raise BadLine(f"method must be {METHOD!r}, got {content['method']!r:.60}", "invalid_method")
        url = content.get("url")
        if url not in URLS:
            raise BadLine(f"url must be one of {', '.join(URLS)}, got {url!r:.60}", "invalid_url")
        if "body" not in content:
            raise BadLine("the line has no body", "invalid_line")
        body = content["body"]
        return chat_request(body, formatter=formatter) if url == CHATS else completion_request(body)


def parse_line(number: int, line: bytes) -> BatchLine:
    """A line's custom_id and content, or what is wrong with it."""
    try:
        content = strict_json.loads(line, allow_nan=False, max_depth=strict_json.MAX_DEPTH)
    except json.JSONDecodeError as error:
        return BatchLine(number, error=BadLine(f"line {number} is not JSON: {error.msg}", "invalid_json"))
    except (ValueError, RecursionError) as error:  # not UTF-8, a key twice, nested too deeply
        return BatchLine(number, error=BadLine(f"line {number} is not JSON: {error}", "invalid_json"))
    if not isinstance(content, dict):
        wrong = BadLine(f"line {number} must be an object with {', '.join(LINE_FIELDS)}", "invalid_line")
        return BatchLine(number, error=wrong)
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        wrong = BadLine(f"custom_id must be a text that is not empty, got {custom_id!r:.60}", "invalid_custom_id")
        return BatchLine(number, error=wrong)
    return BatchLine(number, custom_id, content)


class LineSource:
    """The lines of a file or a pipe, with their numbers, without the empty ones."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._number = 0
        self._pipe = _descriptor_of_pipe(file)
        self._read = bytearray()  # of a pipe, up to its last line that is complete, and beyond
        self.at_end = False

    def take(self, may_wait: bool) -> tuple[int, bytes] | None:
        """The next line. None at the end, and if none has come yet through a pipe, unless it may wait for it."""
        while not self.at_end:
            line = self._next_line(may_wait)
            if line is None:
                return None
            self.at_end = not line
            self._number += 1
            if self._number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                return self._number, line
        return None

    def _next_line(self, may_wait: bool) -> bytes | None:
        """The next line with its end; empty at the end of the file."""
        if self._pipe is None:
            return self._file.readline()
        while (end := self._read.find(b"\n") + 1) == 0:
            if not may_wait and not select.select([self._pipe], [], [], 0)[0]:
                return None
            received = os.read(self._pipe, READ_BYTES)
            self._read += received
            if not received:
                end = len(self._read)
                break
        line = bytes(self._read[:end])
        del self._read[:end]
        return line


@contextlib.contextmanager
def open_input(path: str) -> Iterator[LineSource]:
    """The lines of a file, or of stdin."""
    if path == STDIN:
        yield LineSource(sys.stdin.buffer)
        return
    with open(path, "rb") as file:
        yield LineSource(file)


def count_lines(path: str, group: int, n_groups: int) -> int | None:
    """The lines of a file that are one group's; None for a pipe."""
    if path == STDIN or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return sum(index % n_groups == group and bool(line.strip()) for index, line in enumerate(file))


def _descriptor_of_pipe(file: IO[bytes]) -> int | None:
    """The descriptor of a pipe or terminal, on which a reader may have to wait."""
    try:
        descriptor = file.fileno()
        return None if os.path.isfile(descriptor) or sys.platform == "win32" else descriptor
    except OSError:  # no file of the system's
        return None
