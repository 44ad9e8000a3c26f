"""`python -m fastllama.benchmarks.kernels_report`: compile every kernel for GPUs that are not here; keep a table of it.

Each GPU has a process of its own, two at a time, and so has the counting of bytes, which interprets.
"""

import difflib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import triton

from fastllama.benchmarks.kernels_report import markdown
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, compiling_environment
from fastllama.benchmarks.kernels_report.markdown import document, heading, sections
from fastllama.benchmarks.kernels_report.table import H200, Row, compiled_rows, traffic_rows, violations, wasteful
from fastllama.kernels.launch import target

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "docs" / "compiled"
CACHE = ROOT / ".cache" / "triton"
TRAFFIC = "traffic"
PROCESSES = 2
SHOWN_DIFFERENCES = 40


def collect(parts: tuple[str, ...]) -> dict[str, list[Row]]:
    """The rows of each part, a GPU's name or "traffic", in processes of their own. RuntimeError where one fails."""

    def run(part: str) -> list[Row]:
        environment = compiling_environment(str(CACHE))
        if part == TRAFFIC:
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-W", "error", "-m", "fastllama.benchmarks.kernels_report", "--part", part]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling for {part} failed:\n{done.stderr}")
        click.echo(f"{part}: {done.stdout.count(chr(10))} launches", err=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(PROCESSES) as pool:
        return dict(zip(parts, pool.map(run, parts), strict=True))


def report(gpus: tuple[str, ...] = tuple(GPUS)) -> tuple[str, int, list[str]]:
    """The table in Markdown, how many launches stand in it, and the rules that they break."""
    rows = collect((*gpus, TRAFFIC))
    compiled = [row for gpu in gpus for row in rows[gpu]]
    broken = violations(compiled) + wasteful(rows[TRAFFIC])
    return document(triton.__version__, compiled, rows[TRAFFIC]), len(compiled), broken


def checked(part: str) -> tuple[list[str], list[str]]:
    """Of one GPU, or of "traffic" -> (rules that are broken, lines that differ from the table in the repository)."""
    rows = collect((part,))[part]
    if part == TRAFFIC:
        fresh, broken, titles = document(triton.__version__, [], rows), wasteful(rows), [markdown.TRAFFIC]
    else:
        fresh, broken, titles = document(triton.__version__, rows, []), violations(rows), [heading(part)]
        titles += [markdown.WEIGHTS] if part == H200 else []
    path = table_path()
    kept, made = (sections(text) for text in (path.read_text(encoding="utf-8") if path.exists() else "", fresh))
    changed: list[str] = []
    for title in (markdown.LAUNCHES, *titles):
        before, after = kept.get(title, []), made[title]
        if title == markdown.LAUNCHES:  # where all GPUs stand together
            before, after = ([line for line in lines if f"| {part} |" in line] for lines in (before, after))
        changed += difflib.unified_diff(before, after, title, "compiled now", lineterm="", n=0)
    return broken, changed


def table_path() -> Path:
    """Where the installed triton's table stands."""
    return TABLES / f"triton-{triton.__version__}.md"


def differences(table: str) -> list[str]:
    """Lines in which a fresh table differs from the one in the repository."""
    path = table_path()
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    changes = difflib.unified_diff(kept, table.splitlines(), "in the repository", "compiled now", lineterm="", n=0)
    return list(changes)


@click.command(epilog="Example: python -m fastllama.benchmarks.kernels_report --check")
@click.option("--check", is_flag=True, help="Change nothing; fail where the table differs or a rule is broken.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
@click.option("--part", type=click.Choice([*GPUS, TRAFFIC]), hidden=True)
def main(check: bool, as_json: bool, part: str | None) -> None:
    """Compile every launch of the models for seven GPUs and write what the compiler made of them to docs/compiled/.

    Rules: no spills, shared memory within the GPU's, weights and cache read 16 bytes at a time, matrix instructions
    where there is a dot, a barrier before each hand-over, five launches a layer, dependent launches that wait.
    """
    if part is not None:
        _print_part(part)
        return
    table, n_launches, broken = report()
    changed = differences(table)
    for line in (*broken, *changed[:SHOWN_DIFFERENCES]):
        click.echo(line, err=True)
    if not check:
        TABLES.mkdir(parents=True, exist_ok=True)
        table_path().write_text(table, encoding="utf-8")
        click.echo(
            f"wrote {os.path.relpath(table_path())}: {n_launches} launches, {len(changed)} changed lines", err=True
        )
    if as_json:
        summary = {"triton": triton.__version__, "launches": n_launches, "violations": broken, "changed": len(changed)}
        click.echo(json.dumps(summary))
    if broken or (check and changed):
        raise SystemExit(1)


def _print_part(part: str) -> None:
    """One part's rows on stdout, a JSON object a line."""
    if part == TRAFFIC:
        h200 = GPUS[H200]
        target.INTERPRETED = target.Target(h200.backend, h200.arch, h200.processors, h200.shared_bytes)
    for row in traffic_rows() if part == TRAFFIC else compiled_rows(part):
        click.echo(json.dumps(row))
