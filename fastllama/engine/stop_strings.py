"""Finds stop strings in a text that comes in pieces, and holds back what may become one."""

from collections.abc import Sequence


class StopStrings:
    """The text of one answer, up to the first stop string.

    Text is released as soon as it cannot be the beginning of a stop string any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None  # the stop string, once it is there

    def push(self, text: str) -> str:
        """The text that this piece releases. Nothing is released after a stop string was found."""
        if self.found is not None:
            return ""
        held = self._held + text
        # The first to be complete ends the answer, however the text is cut into pieces.
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return held[:at]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """The text that was held back: the answer has ended otherwise."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a beginning of the stop string, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
