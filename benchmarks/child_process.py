"""A child process that answers requests. Requests and replies are JSON objects, one per line of its stdin and stdout.

`ChildProcess` is for the parent; the child's module calls `answer_requests`.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

import fastllama
from fastllama.benchmarks.result_file import one_line
from fastllama.distributed.environment import single_process_environ
from fastllama.distributed.worker_processes import exit_hooks

CLOSE_TIMEOUT_S = 10

Message = dict[str, Any]


class ChildError(Exception):
    """A child process did not start or failed. The message gives the reason in one line."""


class ChildProcess:
    """`python -m module` as a child process with as many threads as this one. As a context manager, it ends with it."""

    def __init__(self, module: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fastllama-child-")
        self.folder = Path(self._folder.name)  # removed with the process
        self._log = self.folder / "stderr.txt"
        self._error: str | None = None  # the first one
        root = str(Path(fastllama.__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**single_process_environ(), "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C reaches the parent only, which ends the child after saving results
            )
        exit_hooks.append(self.close)

    def ask(self, request: Message) -> Message:
        """The reply to a request. ChildError if the child fails, and for every later request."""
        if self._error is None:
            try:
                return self._exchange(request)
            except ChildError as error:
                self._error = str(error)
        raise ChildError(self._error)

    def _exchange(self, request: Message) -> Message:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            raise ChildError(f"the process ended: {self._last_log_line()}")
        reply: Message = json.loads(line)
        if "error" in reply:
            raise ChildError(one_line(reply["error"]))
        return reply

    def _last_log_line(self) -> str:
        if not self._log.exists():
            return "it was closed"
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a message")

    def close(self) -> None:
        """End the process. Can be called twice."""
        if self.close in exit_hooks:
            exit_hooks.remove(self.close)
        self._process.kill()
        self._process.wait(CLOSE_TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def answer_requests(answer: Callable[[Message], Message]) -> int:
    """Reply to each line of stdin. An exception gives the reply {"error": ...} and ends. Returns the exit code."""
    torch.set_num_threads(int(sys.argv[1]))
    # Libraries print to stdout. Replies get a file descriptor of their own, and everything else goes to stderr.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            code = 0
            try:
                text = json.dumps(answer(json.loads(line)))
            except Exception as error:
                code, text = 1, json.dumps({"error": f"{type(error).__name__}: {error}"})
            replies.write(text + "\n")
            replies.flush()
            if code:
                return code
    return 0
