"""`python -m fastllama.benchmarks.kernels_report`: compiles the kernels for GPUs that are not present.

Each GPU has its own process. Counting bytes, which needs the interpreter, has another. Two processes run at a time.
"""

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import triton

from fastllama.benchmarks.kernels_report import markdown
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, compiling_environment
from fastllama.benchmarks.kernels_report.markdown import document, heading, sections
from fastllama.benchmarks.kernels_report.model_launches import MODELS
from fastllama.benchmarks.kernels_report.table import (
    H200,
    Row,
    compiled_rows,
    excess_traffic,
    traffic_rows,
    violations,
)
from fastllama.kernels.launch import target

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "docs" / "compiled"
CACHE = ROOT / ".cache" / "triton"
TRAFFIC = "traffic"
PROCESSES = 2
SHOWN_DIFFERENCES = 40


def collect(parts: tuple[str, ...], models: Sequence[str] = ()) -> dict[str, list[Row]]:
    """The rows of each part, a GPU's name or "traffic", each made in its own process. RuntimeError if one fails.

    models: those to compile for a GPU; all if there are none.
    """

    def run(part: str) -> list[Row]:
        environment = compiling_environment(str(CACHE)) | {"TRITON_INTERPRET": str(int(part == TRAFFIC))}
        command = [sys.executable, "-W", "error", "-m", "fastllama.benchmarks.kernels_report", "--part", part]
        command += [word for model in models for word in ("--model", model)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling for {part} failed:\n{done.stderr}")
        click.echo(f"{part}: {done.stdout.count(chr(10))} launches", err=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(PROCESSES) as pool:
        return dict(zip(parts, pool.map(run, parts), strict=True))


def report(parts: tuple[str, ...] = (*GPUS, TRAFFIC), models: Sequence[str] = ()) -> tuple[str, int, list[str]]:
    """(the document in Markdown, the number of compiled launches, the rules that are broken) of some parts."""
    rows = collect(parts, models)
    traffic = rows.pop(TRAFFIC, [])
    compiled = [row for part in rows.values() for row in part]
    broken = violations(compiled) + excess_traffic(traffic)
    return document(triton.__version__, compiled, traffic), len(compiled), broken


def checked(part: str, models: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(broken rules, lines that differ from the document in the repository) of one GPU, or of "traffic".

    models: those to compile for the GPU. Then only their lines are compared. All if there are none.
    """
    fresh, _, broken = report((part,), models)
    titles = [markdown.LAUNCHES, markdown.TRAFFIC if part == TRAFFIC else heading(part)]
    titles += [markdown.WEIGHTS] if part == H200 else []
    kept, made = sections(_kept()), sections(fresh)
    changed: list[str] = []
    for title in titles:
        before, after = kept.get(title, []), made[title]
        if title == markdown.LAUNCHES:  # a table with the lines of all GPUs
            before, after = ([line for line in lines if f"| {part} |" in line] for lines in (before, after))
        if models:
            before, after = (_lines_of(models, lines) for lines in (before, after))
        changed += _differences(before, after, title)
    return broken, changed


def table_path() -> Path:
    """The path of the document for the installed triton."""
    return TABLES / f"triton-{triton.__version__}.md"


def _kept() -> str:
    """The document in the repository; empty if there is none for this triton."""
    path = table_path()
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _lines_of(models: Sequence[str], lines: list[str]) -> list[str]:
    """The lines of tables that are about some models."""
    return [line for line in lines if any(f"| {model} |" in line for model in models)]


def _differences(before: list[str], after: list[str], title: str) -> list[str]:
    return list(difflib.unified_diff(before, after, title, "compiled now", lineterm="", n=0))


@click.command(epilog="Example: python -m fastllama.benchmarks.kernels_report --check")
@click.option("--check", is_flag=True, help="Change nothing; fail where the table differs or a rule is broken.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
@click.option("--part", type=click.Choice([*GPUS, TRAFFIC]), hidden=True)
@click.option("--model", "models", multiple=True, type=click.Choice([*MODELS]), hidden=True)
def main(check: bool, as_json: bool, part: str | None, models: tuple[str, ...]) -> None:
    """Compile every launch of the models for seven GPUs and write what the compiler made of them to docs/compiled/.

    Rules: no spills, shared memory within the GPU's, weights and cache read 16 bytes at a time, matrix instructions
    where there is a dot, a barrier before each hand-over, five launches a layer, dependent launches that wait.
    """
    if part is not None:
        _print_part(part, models)
        return
    table, n_launches, broken = report()
    changed = _differences(_kept().splitlines(), table.splitlines(), "in the repository")
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


def _print_part(part: str, models: Sequence[str]) -> None:
    """Print one part's rows, one JSON object per line. models: of a GPU's rows; all if there are none."""
    if part == TRAFFIC:
        target.INTERPRETED = GPUS[H200]  # interpret the launches that an H200 gets
    for row in traffic_rows() if part == TRAFFIC else compiled_rows(part, models):
        click.echo(json.dumps(row))
