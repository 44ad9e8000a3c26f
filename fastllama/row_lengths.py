"""How many tokens each row has at most, as the host knows it, so that a step without a graph reads only their keys."""

from collections.abc import Sequence


class RowLengths:
    """Upper bounds of the rows' lengths, the newest token included; 0 for rows that have ended."""

    def __init__(self, n_rows: int, limit: int) -> None:
        """No rows. limit: the longest row."""
        self._lengths = [0] * n_rows
        self._limit = limit
        self._new: set[int] = set()  # rows that no step has run yet

    def set(self, row: int, length: int) -> None:
        """A row has so many tokens before the next step."""
        self._lengths[row] = length
        self._new.add(row)

    def end(self, row: int) -> None:
        """A row has ended."""
        self._lengths[row] = 0

    def grow(self, n_rows: int, n_tokens: int) -> None:
        """A step was enqueued that gives each of the first n_rows up to n_tokens."""
        self._lengths[:n_rows] = [length + n_tokens if length else 0 for length in self._lengths[:n_rows]]
        self._new.clear()

    def correct(self, positions: Sequence[int]) -> None:
        """After all steps, the newest tokens of the first rows are at these positions."""
        for row, position in enumerate(positions):
            if self._lengths[row] and row not in self._new:
                self._lengths[row] = position + 1

    def bounds(self, n_rows: int, ahead: int = 0) -> list[int]:
        """Upper bounds for the first n_rows after `ahead` more tokens; 1 for a row that has ended."""
        return [min(length + ahead, self._limit) if length else 1 for length in self._lengths[:n_rows]]
