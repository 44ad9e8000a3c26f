"""The answers of a batch: lines that are appended, whole, whatever ends the process.

A line is written at once, and counts when its line end is there. What a killed process left of its last line is cut
off. Several processes append to one file, each under a lock.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # on Windows, where one process writes
    fcntl = None  # type: ignore[assignment]

ID_PREFIX = "batch_req_"
LINE_BEGIN = f'{{"id": "{ID_PREFIX}'.encode()
DUPLICATE = "duplicate_custom_id"  # the code of an error
FIELDS = {"id", "custom_id", "response", "error"}
# Bytes far behind the end of the file, whose locks are taken: one to append, and one by each group of processes as long
# as it lives. A run begins when all of these are free.
APPEND_LOCK, GROUP_LOCKS, MAX_GROUPS = 2**61, 2**62, 2**20
RELEASE_SECONDS = 5.0  # for the other processes of a run whose first one was killed
POLL_SECONDS = 0.05
SEARCH_BYTES = 65536


@dataclass
class Answered:
    """The lines whose answers are in the file."""

    custom_ids: set[str] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)  # of lines without a custom_id of their own

    def add(self, record: dict[str, Any]) -> None:
        """Count a line of the file."""
        error = record["error"]
        is_duplicate = isinstance(error, dict) and error.get("code") == DUPLICATE
        if record["custom_id"] is None or is_duplicate:
            self.numbers.add(int(record["id"].removeprefix(ID_PREFIX)))
        else:
            self.custom_ids.add(record["custom_id"])


class OutputFile:
    """A file to which one or several groups of processes append answers. The first one's `begin` comes before."""

    def __init__(self, path: str, group: int = 0, n_groups: int = 1) -> None:
        self.path, self._n_groups = path, n_groups
        self._file: IO[bytes] = open(path, "a+b", buffering=0)  # noqa: SIM115
        if group > 0 and fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, GROUP_LOCKS + group)

    def append(self, record: dict[str, Any]) -> None:
        """Append one line. Raises OSError, which names the file."""
        left = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        try:
            with self._locked():
                self._cut_incomplete_line()
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def begin(self) -> Answered:
        """Take the file for this run, read it, and cut off an incomplete last line.

        Raises ValueError if another run writes it, or if it holds anything but answers.
        """
        self._lock_for_run()
        answered, rest = Answered(), b""
        self._file.seek(0)
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    rest = line
                    break
                if line.strip():
                    answered.add(self._record(number, line))
        if rest[: len(LINE_BEGIN)] != LINE_BEGIN[: len(rest)]:
            raise ValueError(f"{self.path} is not a file of answers, it ends with {rest[:60]!r}: name another")
        self._cut_incomplete_line()
        return answered

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        is_answer = isinstance(record, dict) and record.keys() >= FIELDS and isinstance(record["id"], str)
        if not is_answer or not record["id"].removeprefix(ID_PREFIX).isdecimal():
            raise ValueError(f"{self.path}: line {number} is not an answer of a batch: name another file")
        found: dict[str, Any] = record
        return found

    def _cut_incomplete_line(self) -> None:
        file = self._file
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        while end > 0:
            begin = max(0, end - SEARCH_BYTES)
            file.seek(begin)
            at = file.read(end - begin).rfind(b"\n")
            end = begin
            if at >= 0:
                end = begin + at + 1
                break
        file.truncate(end)

    def _lock_for_run(self) -> None:
        if fcntl is None:
            return
        deadline = time.monotonic() + RELEASE_SECONDS
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, MAX_GROUPS, GROUP_LOCKS)
                fcntl.lockf(self._file, fcntl.LOCK_UN, MAX_GROUPS - 1, GROUP_LOCKS + 1)  # for the other groups
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):  # the file system has no locks
                    return
            if time.monotonic() > deadline:
                raise ValueError(f"{self.path} is being written by another run: wait for its end, or name another file")
            time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._n_groups == 1 or fcntl is None:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, APPEND_LOCK)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, APPEND_LOCK)


def check_is_file(path: str) -> None:
    """Raise ValueError for a path that exists and is no regular file: answers are read again from it."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is not a file: answers are appended to a file")
