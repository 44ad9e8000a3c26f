"""Sections of a GPU report that fail, each in a different way, and one that does not."""

import os
import time
from collections.abc import Iterator
from typing import Any


def fine(bench: Any) -> Iterator[dict[str, Any]]:
    yield {"value": 1}
    yield {"value": 2}


def raises(bench: Any) -> Iterator[dict[str, Any]]:
    yield {"value": 3}
    raise ValueError("it broke")


def crashes(bench: Any) -> Iterator[dict[str, Any]]:
    yield {"value": 4}
    time.sleep(0.2)  # for the queue's thread to send the record
    os._exit(3)


def hangs(bench: Any) -> Iterator[dict[str, Any]]:
    yield {"value": 5}
    time.sleep(3600)


def never_ends(bench: Any) -> Iterator[dict[str, Any]]:
    while True:
        time.sleep(0.05)
        yield {"value": 6}
