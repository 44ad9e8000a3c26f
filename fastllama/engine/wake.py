"""Wakes tasks of asyncio from the thread that brings what the engine has: those of one event loop together.

A step of the engine has something new for every answer. One message to the loop for all of them costs less than one
each. The tasks then compete with the engine for the interpreter, or, from another process, for a processor. So they
rest after their work, and find more the next time: the loop works for a tenth of the time at most, unless the tasks
have waited for `LONGEST_REST`. What somebody waits for, the begin and the end of an answer, comes at once.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator
from weakref import WeakKeyDictionary, ref

REST = 9.0
LONGEST_REST = 0.05  # seconds


class Wake:
    """Wakes a task of the running loop from any thread."""

    def __init__(self, *, at_end: bool = False) -> None:
        """at_end: only when an answer has ended."""
        self.at_end = at_end
        self._bell, self._event, self._is_set = _bell(), asyncio.Event(), False

    def set(self, *, at_once: bool) -> None:
        """Wake the task, at once or after a rest."""
        if at_once or not self._is_set:
            self._is_set = True
            self._bell.ring(self._event, at_once=at_once)

    async def wait(self) -> None:
        """Wait until it is set, and make it ready to be set again."""
        await self._event.wait()
        self._event.clear()
        self._is_set = False


class _Bell:
    """Sets the events of one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)  # it is the key under which this bell is kept
        self._due: deque[asyncio.Event] = deque()
        self._is_rung = False
        self._last = self._last_used = 0.0

    def ring(self, event: asyncio.Event, *, at_once: bool) -> None:
        """Set an event. From any thread."""
        loop = self._loop()
        if loop is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits
            if at_once:
                loop.call_soon_threadsafe(event.set)
                return
            self._due.append(event)
            if not self._is_rung:
                self._is_rung = True
                loop.call_soon_threadsafe(self._set_after_rest)

    def _set_after_rest(self) -> None:
        rest = min(LONGEST_REST, REST * (time.thread_time() - self._last_used))
        left = self._last + rest - time.perf_counter()
        if left > 0:
            asyncio.get_running_loop().call_later(left, self._set)
        else:
            self._set()

    def _set(self) -> None:
        self._last, self._last_used = time.perf_counter(), time.thread_time()
        self._is_rung = False  # first: an event that comes meanwhile rings again
        for event in _taken(self._due):
            event.set()


_bells: "WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell]" = WeakKeyDictionary()


def _bell() -> _Bell:
    """That of the running loop."""
    loop = asyncio.get_running_loop()
    if loop not in _bells:
        _bells[loop] = _Bell(loop)
    return _bells[loop]


def _taken(due: deque[asyncio.Event]) -> Iterator[asyncio.Event]:
    while due:
        yield due.popleft()
