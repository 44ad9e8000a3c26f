"""Request: no increment is lost between the engine's thread and a reader."""

import threading
from types import SimpleNamespace
from typing import Any

from fastllama import SamplingParams
from fastllama.engine import Increment, Request
from fastllama.engine.commands import NewRequest

BLOCKED_SECONDS = 0.2  # the engine's thread cannot go on while the reader decides


class LateRequest(Request):
    """Its last increment comes just after the reader has found none."""

    adding: threading.Thread | None = None

    @property
    def is_finished(self) -> bool:
        if self.adding is None:
            last = Increment(0, "b", [98], None, None, "length", None)
            self.adding = threading.Thread(target=self.add, args=(last,))
            self.adding.start()
            self.adding.join(BLOCKED_SECONDS)
        return super().is_finished


def test_an_increment_that_comes_while_the_reader_looks_is_read() -> None:
    engine: Any = SimpleNamespace(has_thread=True)
    request = LateRequest(engine, NewRequest([5], SamplingParams(), frozenset(), budget=3, number=1))
    request.add(Increment(0, "a", [97], None, None, None, None))
    assert [one.text for one in request] == ["a", "b"]
    assert request.adding is not None
    request.adding.join()
    assert request.result().answer.text == "ab"
