"""What one refusal is: files that are well-formed, the call that refuses them, and the error's message."""

import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fastllama import Llama

# The folders of every case, in the current one: so messages have the same paths on any machine.
MODEL, ADAPTER = Path("model"), Path("adapter")


def build(tokenizer_path: str | None = None, **options: Any) -> Llama:
    """Build the model of the case."""
    return Llama.build(str(MODEL), tokenizer_path, 16, 1, device="cpu", **options)


def chat(content: str = "Hi") -> None:
    """Build the model of the case, and ask it something."""
    build().chat_completion([[{"role": "user", "content": content}]], max_gen_len=1)


def without_package(name: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call as on a machine where a package is not installed."""

    def called() -> object:
        with mock.patch.dict(sys.modules, {name: None}):
            return call()

    return called


@dataclass(frozen=True)
class Refusal:
    """A case.

    Attributes:
        what: what someone has, in Markdown: the first column of the table.
        write: writes it to `MODEL` and `ADAPTER`.
        call: what is refused.
        error: the type of the error; AssertionError where Meta's code raises it.
    """

    what: str
    write: Callable[[], object]
    call: Callable[[], object] = build
    error: type[Exception] = ValueError

    def refused(self) -> Exception:
        """The error. RuntimeError if there is none, or one of another type."""
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            MODEL.mkdir()
            self.write()
            try:
                self.call()
            except Exception as error:
                if type(error) is self.error:
                    return error
                raise RuntimeError(f"{self.what}: expected {self.error.__name__}") from error
        raise RuntimeError(f"{self.what}: it is not refused")
