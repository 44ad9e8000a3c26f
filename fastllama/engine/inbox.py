"""The commands that an engine has been given, in the order in which they came.

Other threads put them in at any time, and the next step takes them out. So nobody waits for the step that runs.
"""

from collections import deque
from collections.abc import Callable

from fastllama.engine.commands import Command
from fastllama.engine.request import Request


class Inbox:
    """Commands with the handles of their requests.

    The caller's lock guards `put` and `gather`. What was gathered belongs to whoever runs the step.
    """

    def __init__(self) -> None:
        self._new: list[tuple[Command, Request | None]] = []
        self._gathered: deque[tuple[Command, Request | None]] = deque()  # only the step uses them

    @property
    def is_empty(self) -> bool:
        """Whether all commands have been followed. Certain for who runs the step, or holds the caller's lock."""
        return not self._new and not self._gathered

    def put(self, command: Command, request: Request | None) -> None:
        """The next command, and its request if it has one."""
        self._new.append((command, request))

    def gather(self) -> list[Command]:
        """Take in the commands that have come since the last time -> these. `follow` comes next."""
        new, self._new = self._new, []
        self._gathered.extend(new)
        return [command for command, _ in new]

    def follow(self, do: Callable[[Command, Request], None]) -> None:
        """Do what was gathered, in order. What raises an error is done again the next time, and what comes after it."""
        while self._gathered:
            command, request = self._gathered[0]
            if request is not None:  # a preparation is for other processes
                do(command, request)
            self._gathered.popleft()

    def clear(self) -> list[Request]:
        """Drop all commands -> their requests."""
        self.gather()
        requests = [request for _, request in self._gathered if request is not None]
        self._gathered.clear()
        return requests
