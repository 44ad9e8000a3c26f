"""The summary of a GPU report in Markdown."""

from collections.abc import Sequence
from typing import Any

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.result_file import ResultFile
from fastllama.benchmarks.tables import markdown

TITLES = {
    "self-check": "Self-check",
    "boundaries": "The cost of a launch",
    "tests": "GPU tests",
    "launches": "A decode step, launch by launch",
    "decode": "Tokens a second",
    "engine": "Many requests through the engine",
    "speculation": "Steps that check guesses, of random models: their cost, beside a plain step",
    "quantised models": "Tokens a second with quantised weights",
    "whole step": "A whole step, compared with the sum of its launches",
    "prefill": "Prefill",
    "instruction rates": "Instructions that a multiprocessor executes",
    "quantised weights": "Projections with quantised weights",
    "sampling": "Sampling",
    "switches": "Features turned off: graph, dependent launch, prefetches, unrolling",
    "kernel tests": "Kernel tests, compiled",
    "variants": "Other launch configurations, µs",
    "quantised variants": "Other launch configurations with quantised weights, µs",
}
LAUNCH_HEAD = ("launch", "", "µs", "least", "share", "ms a step", "gap, ms")
VARIANT_CASE, VARIANT_HEAD = ("model", "batch", "op"), ("in the table", "µs", "best other", "µs", "library, µs")
RATE_HEAD = (
    "model",
    "weights",
    "batch",
    "tokens a second",
    "goal on an H200",
    "GB a step",
    "share of the speed of light",
)
Record = dict[str, Any]


def summary(result: ResultFile) -> str:
    """One page with all results so far."""
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
    for (suite,), of_suite in _grouped(records, "suite").items():
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
    make = SECTIONS.get(suite, _plain)
    return [*make(found), *notes]


def _plain(records: Sequence[Record]) -> list[str]:
    """One table, with a column for each key of any record."""
    keys = [key for key in dict.fromkeys(key for record in records for key in record) if key != "suite"]
    heads = [key.replace("_", " ") for key in keys]
    return [markdown(heads, ([_text(record.get(key)) for key in keys] for record in records))]


def _launches(records: Sequence[Record]) -> list[str]:
    """A table for each case, with every launch and their sum."""
    parts = []
    for (model, batch, context), found in _grouped(records, "model", "batch", "context").items():
        rows: list[list[object]] = []
        total, least_total = 0.0, 0.0
        for record in found:
            time, least, count = record["microseconds"], record["least_microseconds"], record["count"]
            step, least_step = count * time / 1e3, count * (least or 0.0) / 1e3
            total, least_total = total + step, least_total + least_step
            known = "" if least is None else f"{least:.2f}", f"{record['share']:.0%}" if least else ""
            gap = "" if least is None else f"{step - least_step:.3f}"
            rows.append([record["launch"], f"x {count}", f"{time:.2f}", *known, f"{step:.3f}", gap])
        share, gap = (f"{least_total / total:.0%}", f"{total - least_total:.3f}") if least_total else ("", "")
        rows.append(["all", "", "", "", share, f"{total:.3f}", gap])
        parts += [f"{model}, batch {batch}, context {context}", markdown(LAUNCH_HEAD, rows)]
    return parts


def _variants(records: Sequence[Record]) -> list[str]:
    """A line for each op: the table's launch, the best other launch, and the library if it has such weights."""
    case_names = VARIANT_CASE + (("quantize",) if "quantize" in records[0] else ())
    rows: list[list[object]] = []
    for case, found in _grouped(records, *case_names).items():
        timed = [record for record in found if record["microseconds"] is not None]
        in_table = next((record for record in timed if record["in_table"]), None)
        library = next((record for record in timed if record["variant"].startswith("the library")), None)
        others = [record for record in timed if record is not in_table and record is not library]
        best = min(others, key=lambda record: float(record["microseconds"]), default=None)
        rows.append([*case, *_variant(in_table), *_variant(best), _variant(library)[1]])
    return [markdown(case_names + VARIANT_HEAD, rows)]


def _quantised_models(records: Sequence[Record]) -> list[str]:
    """A line for each model, format and batch, with the goal."""
    names = ("model", "quantize", "batch", "tokens_per_second", "goal_on_h200", "step_gb")
    rows = [
        [*(_text(record[name]) for name in names), f"{record['share']:.0%}" if record["share"] else ""]
        for record in records
    ]
    return [markdown(RATE_HEAD, rows)]


def _grouped(records: Sequence[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """The records by their values of these keys."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def _variant(record: Record | None) -> tuple[str, str]:
    return (record["variant"], _text(record["microseconds"])) if record else ("", "")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


# Those that are not plain tables.
SECTIONS = {
    "launches": _launches,
    "quantised models": _quantised_models,
    "variants": _variants,
    "quantised variants": _variants,
}
