"""Tables of records, as aligned text or in Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

Record = dict[str, Any]
Columns = Mapping[str, Callable[[Record], object]]  # column head -> function from a record to its cell


class Table(NamedTuple):
    """The column heads, and rows with one cell per column."""

    head: Sequence[object]
    rows: Sequence[Sequence[object]]

    def text(self, in_markdown: bool = False) -> str:
        return (markdown if in_markdown else aligned)(self.head, self.rows)


def table_of(records: Sequence[Record], columns: Columns) -> Table:
    """A Table with one row for each record."""
    return Table(list(columns), [[cell(record) for cell in columns.values()] for record in records])


def peer_columns(records: Sequence[Record]) -> Columns:
    """A column for each peer of the records: our speed over the peer's."""
    names = dict.fromkeys(name for record in records for name in record["peers"])
    return {f"vs {name}": partial(_ratio, name) for name in names}


def _ratio(name: str, record: Record) -> str:
    """The median ratio with its range, or the status of a peer that was not measured."""
    peer = record["peers"].get(name)
    if peer is None:
        return "-"
    if peer["status"] != "measured":
        return str(peer["status"])
    ratio = peer["ratio"]
    return f"{ratio['p50']:.2f}x ({ratio['minimum']:.2f}-{ratio['maximum']:.2f})"


def aligned(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Text with right-aligned columns."""
    cells = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
