"""A GPU report for people: one page of Markdown."""

from collections.abc import Sequence
from typing import Any

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.result_file import ResultFile
from fastllama.benchmarks.tables import markdown

TITLES = {
    "self-check": "Self-check",
    "boundaries": "What a boundary between two launches costs",
    "tests": "GPU tests",
    "launches": "A decode step, launch by launch",
    "decode": "Tokens a second",
    "whole step": "A whole step beside the sum of its launches",
    "prefill": "Prefill",
    "sampling": "Sampling",
    "switches": "What the graph, the dependent launch, prefetches and unrolling bring",
    "kernel tests": "Kernel tests, compiled",
    "variants": "Launches beside those of the tables, µs",
}
LAUNCH_HEAD = ("launch", "", "µs", "least", "share", "ms a step", "gap, ms")
VARIANT_HEAD = ("model", "batch", "op", "in the table", "µs", "best other", "µs", "library, µs")
Record = dict[str, Any]


def summary(result: ResultFile) -> str:
    """The report as far as it goes."""
    environment, records = result.environment, result.records
    where = f"{environment.device_name}, torch {environment.torch}, triton {environment.triton}"
    state = {True: ", changed", False: "", None: ""}[environment.git_dirty]
    parts = [
        f"# {where}",
        f"{environment.date}, commit {environment.git_commit}{state}, CUDA {environment.cuda}, driver "
        f"{environment.driver}, clocks {environment.clocks}, Python {environment.python}: `{environment.command}`",
    ]
    if environment.device == "cpu":
        parts.append("**A rehearsal on a CPU: toy sizes, interpreted kernels. The times mean nothing.**")
    if result.interrupted:
        parts.append("Interrupted.")
    if result.ceilings:
        parts.append("## Ceilings")
        parts.append(markdown(["", "median", "p10", "p90", "", "how"], map(_ceiling, result.ceilings.values())))
    if any(None in (record.get("least_microseconds", 0), record.get("least_milliseconds", 0)) for record in records):
        parts.append("**Without ceilings, least times and shares are not known.**")
    for suite in dict.fromkeys(record["suite"] for record in records):
        of_suite = [record for record in records if record["suite"] == suite]
        parts += [f"## {TITLES.get(suite, suite)}", *_section(suite, of_suite)]
    return "\n\n".join(parts) + "\n"


def _ceiling(ceiling: Ceiling) -> Sequence[object]:
    samples = ceiling.samples
    return [ceiling.name, *map(_text, (samples.p50, samples.p10, samples.p90)), ceiling.unit, ceiling.method]


def _section(suite: str, records: Sequence[Record]) -> list[str]:
    found = [record for record in records if "not_run" not in record and record.keys() != {"suite", "error"}]
    notes = [str(record.get("not_run") or f"**{record['error']}**") for record in records if record not in found]
    if not found:
        return notes
    make = {"launches": _launches, "variants": _variants}.get(suite, _plain)
    return [*make(found), *notes]


def _plain(records: Sequence[Record]) -> list[str]:
    """A column for each key of any of them."""
    keys = [key for key in dict.fromkeys(key for record in records for key in record) if key != "suite"]
    heads = [key.replace("_", " ") for key in keys]
    return [markdown(heads, ([_text(record.get(key)) for key in keys] for record in records))]


def _launches(records: Sequence[Record]) -> list[str]:
    """A table for each case: every launch and their sum."""
    parts = []
    for case in dict.fromkeys((record["model"], record["batch"], record["context"]) for record in records):
        mine = [record for record in records if (record["model"], record["batch"], record["context"]) == case]
        rows: list[list[object]] = []
        whole, least_whole = 0.0, 0.0
        for record in mine:
            time, least = record["microseconds"], record["least_microseconds"]  # None without ceilings
            step, least_step = record["count"] * time / 1e3, record["count"] * (least or 0.0) / 1e3
            whole, least_whole = whole + step, least_whole + least_step
            share = f"{record['share']:.0%}" if least else ""
            cells = [f"{time:.2f}", "" if least is None else f"{least:.2f}", share, f"{step:.3f}"]
            gap = "" if least is None else f"{step - least_step:.3f}"
            rows.append([record["launch"], f"x {record['count']}", *cells, gap])
        share, gap = (f"{least_whole / whole:.0%}", f"{whole - least_whole:.3f}") if least_whole else ("", "")
        rows.append(["all", "", "", "", share, f"{whole:.3f}", gap])
        parts += [f"{case[0]}, batch {case[1]}, context {case[2]}", markdown(LAUNCH_HEAD, rows)]
    return parts


def _variants(records: Sequence[Record]) -> list[str]:
    """A line for each op: the table's launch, the best of the others, and the library."""
    rows: list[list[object]] = []
    for case in dict.fromkeys((record["model"], record["batch"], record["op"]) for record in records):
        mine = [record for record in records if (record["model"], record["batch"], record["op"]) == case]
        timed = [record for record in mine if record["microseconds"] is not None]
        usual = next((record for record in timed if record["in_table"]), None)
        library = next((record for record in timed if record["variant"].startswith("the library")), None)
        others = [record for record in timed if record is not usual and record is not library]
        best = min(others, key=lambda record: float(record["microseconds"]), default=None)
        rows.append([*case, *_variant(usual), *_variant(best), _variant(library)[1]])
    return [markdown(VARIANT_HEAD, rows)]


def _variant(record: Record | None) -> tuple[str, str]:
    return (record["variant"], _text(record["microseconds"])) if record else ("", "")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
