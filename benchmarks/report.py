"""A result as tables, for a terminal or in Markdown: what it was measured on, then suite by suite."""

from collections.abc import Callable, Sequence
from typing import Any

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.peer_table import notes, peer_table
from fastllama.benchmarks.result_file import ResultFile
from fastllama.benchmarks.suites import decode, generate, kernels, load_and_memory, prefill, step_launches
from fastllama.benchmarks.tables import Table, aligned, markdown

COLUMNS = {
    "kernels": kernels.COLUMNS,
    "decode": decode.COLUMNS,
    "prefill": prefill.COLUMNS,
    "generate": generate.COLUMNS,
}
Records = Sequence[dict[str, Any]]


def report(result: ResultFile, in_markdown: bool = False) -> str:
    """A result for people. Records of suites that `fastllama bench` has not are passed over."""
    environment = result.environment
    layout: Callable[..., str] = markdown if in_markdown else aligned
    machine = f"{environment.device_name}, {environment.threads} threads, torch {environment.torch}"
    ceilings = [_describe(ceiling) for ceiling in result.ceilings.values()]
    lines = [machine, "", *(f"- {line}" for line in ceilings)] if in_markdown else [machine, *ceilings]
    for suite in dict.fromkeys(record["suite"] for record in result.records):
        records = [record for record in result.records if record["suite"] == suite]
        title, parts = _section(suite, records)
        lines += ["", f"**{title}**" if in_markdown else title]
        for part in parts:
            blank = [""] if in_markdown else []
            lines += [*blank, layout(*part) if isinstance(part, Table) else part]
    if result.interrupted:
        lines += ["", "interrupted: only finished cases are shown"]
    return "\n".join(lines)


def _section(suite: str, records: Records) -> tuple[str, list[Table | str]]:
    """(title, tables and the lines between and below them) of one suite."""
    first = records[0]
    nproc = first.get("nproc", 1)
    where = f" on {nproc} processes" if nproc > 1 else ""
    how = f"{first['model']} in {first['dtype']}{where}, {first['rounds']} rounds"
    titles = {
        "kernels": f"kernels of {how}: {first.get('backend')} backend",
        "decode": f"decode of {how}, {first['steps']} greedy tokens",
        "prefill": f"prefill of {how}",
        "generate": f"generate on {how}: ragged prompts, {first['steps']} greedy tokens each",
        "load": f"load {first['model']} as {first['dtype']}{where}, {first['rounds']} rounds",
        "memory": f"memory of {first['model']} in {first['dtype']}{where}, MiB{' of the first' if where else ''}",
    }
    return titles[suite], _parts(suite, records)


def _parts(suite: str, records: Records) -> list[Table | str]:
    found = [record for record in records if "not_run" not in record]
    not_run = [f"not run: {record['not_run']}" for record in records if "not_run" in record]
    not_run = list(dict.fromkeys(not_run))
    if not found:
        return [*not_run, *notes(records)]
    if suite == "load":
        return [load_and_memory.load_table(found), *not_run]
    if suite == "memory":
        return [load_and_memory.memory_table(found), *not_run]
    parts: list[Table | str] = [peer_table(found, COLUMNS[suite]), *notes(records), *not_run]
    if suite == "decode" and all("launches" in record for record in found):
        title = "a step launch by launch: how many, µs of one, % of the speed of light"
        parts += [title, step_launches.table(found)]
    return parts


def _describe(ceiling: Ceiling) -> str:
    samples = ceiling.samples
    digits = 1 if samples.p50 >= 10 else 3
    low, high, best = (f"{value:.{digits}f}" for value in (samples.p10, samples.p90, samples.maximum))
    value = f"{samples.p50:.{digits}f} {ceiling.unit}"
    return f"{ceiling.name:6} {value} (p10 {low}, p90 {high}, best {best}; {ceiling.method})"
