"""What a captured decode step is: launches that are recorded once and replayed."""

from collections.abc import Callable
from typing import Protocol


class Graph(Protocol):
    """Launches that are recorded once and replayed."""

    def capture(self, launches: Callable[[], object]) -> None:
        """Record what this function launches. The caller has run it once before."""

    def replay(self) -> None:
        """Enqueue the same launches, on the same memory."""
