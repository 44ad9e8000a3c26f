"""Ctrl-C waits for the end of a step: between two collectives it would leave the processes of a model out of step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

FORCE_QUIT_INTERRUPTS = 3  # this many Ctrl-C end the process without waiting for the end of a step
EXIT_INTERRUPTED = 130


@contextlib.contextmanager
def delay_interrupts() -> Iterator[None]:
    """A block that delays a Ctrl-C until its end. FORCE_QUIT_INTERRUPTS of them end the process at once."""
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a shell's background job
    if is_ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    n_interrupts = 0

    def count_interrupt(number: int, frame: Any) -> None:
        nonlocal n_interrupts
        n_interrupts += 1
        if n_interrupts >= FORCE_QUIT_INTERRUPTS:
            os._exit(EXIT_INTERRUPTED)

    before = signal.signal(signal.SIGINT, count_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if n_interrupts:
        raise KeyboardInterrupt
