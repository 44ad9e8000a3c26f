"""Records and their peers as a table: a line each, a column for each figure and for each peer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastllama.benchmarks.tables import Table

BUSY_CORES = 0.1  # cores used by others from which a figure deserves a warning

Record = dict[str, Any]
Columns = Mapping[str, Callable[[Record], object]]  # by head


def peer_table(records: Sequence[Record], columns: Columns) -> Table:
    """The records' figures by `columns`, and how many times as fast as each peer ours is."""
    peers = list(dict.fromkeys(name for record in records for name in record["peers"]))
    rows = [
        [*(cell(record) for cell in columns.values()), *(_versus(record, name) for name in peers)] for record in records
    ]
    return Table([*columns, *(f"vs {name}" for name in peers)], rows)


def _versus(record: Record, name: str) -> str:
    """The ratio with its range, or why it is not known."""
    peer = record["peers"].get(name)
    if peer is None:
        return "-"
    if peer["status"] != "measured":
        return str(peer["status"])
    ratio = peer["ratio"]
    return f"{ratio['p50']:.2f}x ({ratio['minimum']:.2f}-{ratio['maximum']:.2f})"


def notes(records: Sequence[Record]) -> list[str]:
    """What stands below a table: why a peer was not timed, and where others disturbed."""
    found = [
        f"{name} {peer['status']}: {peer['reason']}"
        for record in records
        for name, peer in record["peers"].items()
        if peer["status"] != "measured"
    ]
    for record in records:
        for name, peer in record["peers"].items():
            agreement = peer.get("agreement")
            if peer["status"] == "measured" and agreement and agreement["tokens_compared"] < agreement["tokens_total"]:
                found.append(
                    f"{name}: {agreement['tokens_compared']} of {agreement['tokens_total']} tokens compared at batch "
                    f"{record['batch']} context {record['context']}, up to a tie in which the two chose differently"
                )
    busy = [record["other_cores"] for record in records if record["other_cores"] > BUSY_CORES]
    if busy:
        found.append(
            f"other programs used up to {max(busy):.1f} cores during {len(busy)} of {len(records)} measurements; "
            "measure again when they rest"
        )
    return list(dict.fromkeys(found))
