"""Tables for people: aligned on a terminal, and in Markdown."""

from collections.abc import Iterable, Sequence


def aligned(rows: Sequence[Sequence[object]]) -> str:
    """Rows of as many cells, the first being the heads, in columns that end together."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
