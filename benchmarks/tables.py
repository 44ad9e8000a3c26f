"""Tables for people: aligned on a terminal, and in Markdown."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Heads, and rows of as many cells."""

    head: Sequence[object]
    rows: Sequence[Sequence[object]]


def aligned(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in columns that end together."""
    cells = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
