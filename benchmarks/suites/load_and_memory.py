"""What it takes to start: the load suite, and what it takes to run: the memory suite. Each build in a fresh process."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.models import ModelSource
from fastllama.benchmarks.statistics import GIGA, percentile, summarize
from fastllama.benchmarks.suites import loading_process
from fastllama.benchmarks.suites.comparison import Case
from fastllama.benchmarks.tables import Table
from fastllama.distributed.environment import single_process_environ

MIB = 2**20
WEIGHT_PATTERNS = ("*.pth", "*.safetensors")


class LoadError(Exception):
    """The process that builds the model failed; the message says why in one line."""


def load_record(case: Case, source: ModelSource, how: dict[str, Any], copy: Ceiling) -> dict[str, Any]:
    """Seconds and peak host memory of `Llama.build`, after one that brings the files into the page cache.

    Shares are of the copy bandwidth. Random weights are made, not read: there is nothing to measure.
    """
    if source.ckpt_dir is None:
        return _not_run("random weights are made, not loaded: name a checkpoint folder")
    found = [_build(case, source, how) for _ in range(case.rounds + 1)][1:]
    seconds = [one["seconds"] for one in found]
    weights = sum(path.stat().st_size for path in weight_files(Path(source.ckpt_dir)))
    return {
        "seconds": asdict(summarize(seconds)),
        "checkpoint_bytes": weights,
        "gb_per_second": weights / percentile(seconds, 50) / GIGA,
        "copy_share": weights / percentile(seconds, 50) / GIGA / copy.value,
        "peak_host_bytes": max(one["peak_host_bytes"] for one in found),
        "held_bytes": found[0]["held_bytes"],
        **_undisturbed(),
    }


def memory_record(case: Case, source: ModelSource, how: dict[str, Any]) -> dict[str, Any]:
    """What a model holds and takes at most, beside what was planned for it before anything was allocated."""
    found = _build(case, source, how)
    share = found["peak_bytes"] / found["planned"]["total"]
    return {key: found[key] for key in ("held_bytes", "peak_bytes", "planned")} | {"share": share} | _undisturbed()


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's files of weights: one format's, Meta's where there are both."""
    for pattern in WEIGHT_PATTERNS:
        for place in (folder, folder / "original"):
            if files := sorted(place.glob(pattern)):
                return files
    return []


def _undisturbed() -> dict[str, Any]:
    return {"other_cores": 0.0, "peers": {}}


def _not_run(reason: str) -> dict[str, Any]:
    return {"not_run": reason, **_undisturbed()}


def _build(case: Case, source: ModelSource, how: dict[str, Any]) -> dict[str, Any]:
    request = how | {"source": source.to_json(), "batch": case.batch, "context": case.context, "steps": case.steps}
    request["threads"] = torch.get_num_threads()
    command = [sys.executable, "-m", loading_process.__name__]
    done = subprocess.run(
        command,
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        check=False,
        env=single_process_environ(),
    )
    if done.returncode:
        raise LoadError(done.stderr.strip().rpartition("\n")[2])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def load_table(records: Sequence[dict[str, Any]]) -> Table:
    """The load suite's records for people."""
    rows = []
    for record in records:
        sizes = (record["peak_host_bytes"], record["held_bytes"])
        rate = [f"{record['gb_per_second']:.2f}", f"{record['copy_share'] * 100:.0f}%"]
        rows.append([f"{record['seconds']['p50']:.2f}", *rate, *(f"{size / MIB:.0f}" for size in sizes)])
    return Table(["seconds p50", "GB/s", "% of copy", "peak host MiB", "held MiB"], rows)


def memory_table(records: Sequence[dict[str, Any]]) -> Table:
    """The memory suite's records for people, in MiB."""
    rows = []
    for record in records:
        planned = record["planned"]
        sizes = [record["held_bytes"], record["peak_bytes"], planned["total"]]
        sizes += [planned[name] for name in ("weights", "cache", "workspace")]
        rows.append([record["batch"], record["context"], *(f"{size / MIB:.0f}" for size in sizes)])
    return Table(["batch", "context", "held", "peak", "planned", "weights", "cache", "workspace"], rows)
