"""The load suite (seconds and host memory of `Llama.build`) and the memory suite (bytes that a model holds and uses).

Each build runs in a fresh process, which runs this module too.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.child_process import ChildProcess, answer_requests
from fastllama.benchmarks.models import ModelSpec, build_from_json
from fastllama.benchmarks.runners import Ours
from fastllama.benchmarks.statistics import GIGA, percentile, summarize
from fastllama.benchmarks.suites.interleaved import Case
from fastllama.benchmarks.tables import Columns, Record
from fastllama.benchmarks.timing import synchronize
from fastllama.checkpoint import open_checkpoint
from fastllama.distributed import driver
from fastllama.generation import Llama
from fastllama.memory_plan import plan_memory

MIB = 2**20
SAMPLE_SECONDS = 0.002
NO_PEERS: Record = {"other_cores": 0.0, "peers": {}}


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / MIB:.0f}"


LOAD_COLUMNS: Columns = {
    "seconds p50": lambda record: f"{record['seconds']['p50']:.2f}",
    "GB/s": lambda record: f"{record['gb_per_second']:.2f}",
    "% of copy": lambda record: f"{record['copy_share'] * 100:.0f}%",
    "peak host MiB": lambda record: _mib(record["peak_host_bytes"]),
    "held MiB": lambda record: _mib(record["held_bytes"]),
}
MEMORY_COLUMNS: Columns = {
    "batch": itemgetter("batch"),
    "context": itemgetter("context"),
    "held": lambda record: _mib(record["held_bytes"]),
    "peak": lambda record: _mib(record["peak_bytes"]),
    "planned": lambda record: _mib(record["planned"]["total"]),
    "weights": lambda record: _mib(record["planned"]["weights"]),
    "cache": lambda record: _mib(record["planned"]["cache"]),
    "workspace": lambda record: _mib(record["planned"]["workspace"]),
}


def load_record(case: Case, model: ModelSpec, nproc: int, copy: Ceiling) -> Record:
    """Seconds and peak host memory of `Llama.build`. The first build fills the page cache and does not count.

    Shares are of the copy bandwidth. Random weights are not read from files, so there is nothing to measure.
    """
    ckpt_dir = model.source.ckpt_dir
    if ckpt_dir is None:
        return {"not_run": "random weights are made, not loaded: name a checkpoint folder", **NO_PEERS}
    found = [_build(case, model, nproc) for _ in range(case.rounds + 1)][1:]
    seconds = [one["seconds"] for one in found]
    weights = sum(size for _, size in open_checkpoint(ckpt_dir).files)
    rate = weights / percentile(seconds, 50) / GIGA
    return {
        "seconds": asdict(summarize(seconds)),
        "checkpoint_bytes": weights,
        "gb_per_second": rate,
        "copy_share": rate / copy.value,
        "peak_host_bytes": max(one["peak_host_bytes"] for one in found),
        "held_bytes": found[0]["held_bytes"],
        **NO_PEERS,
    }


def memory_record(case: Case, model: ModelSpec, nproc: int) -> Record:
    """The bytes that a model holds, their peak, and the memory plan made before allocation."""
    found = _build(case, model, nproc)
    share = found["peak_bytes"] / found["planned"]["total"]
    return {key: found[key] for key in ("held_bytes", "peak_bytes", "planned")} | {"share": share} | NO_PEERS


def _build(case: Case, model: ModelSpec, nproc: int) -> dict[str, Any]:
    with ChildProcess(__name__) as child:
        return child.ask({"model": model.to_json(), "nproc": nproc, "steps": case.steps})


def own_bytes() -> int:
    """This process's host memory without mapped files, which belong to the page cache."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


@contextlib.contextmanager
def peak_host_memory() -> Iterator[SimpleNamespace]:
    """Sample `own_bytes` while the block runs. Yields an object whose `bytes` is the highest sample."""
    peak, stop = SimpleNamespace(bytes=own_bytes()), threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            peak.bytes = max(peak.bytes, own_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.bytes = max(peak.bytes, own_bytes())


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Build the requested model and generate once. Bytes do not include what the process used before the build."""
    spec = ModelSpec.from_json(**request["model"])
    args, device, nproc, steps = spec.args, spec.device, request["nproc"], request["steps"]
    build: Callable[..., Llama] = build_from_json
    arguments = request["model"]
    if spec.source.ckpt_dir is not None:
        build = Llama.build
        arguments = {name: value for name, value in arguments.items() if name != "source"}
        arguments |= {"ckpt_dir": spec.source.ckpt_dir, "tokenizer_path": str(spec.source.tokenizer_path)}
    if nproc > 1:
        driver.start_workers(nproc)
        driver.wait_for_workers()
    before = own_bytes()
    synchronize(device)
    start = time.perf_counter()
    with peak_host_memory() as loading:
        llm = build(**arguments) if nproc == 1 else driver.build_on_all(build, **arguments)
        synchronize(device)
    seconds = time.perf_counter() - start
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else own_bytes() - before
    with peak_host_memory() as generating:
        case = Case("memory", args.max_batch_size, args.max_seq_len - steps, steps)
        Ours(llm).run(case.prompts(args.vocab_size), steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else generating.bytes - before
    sizes = args.max_batch_size, args.max_seq_len
    plan = plan_memory(args, spec.dtype, *sizes, n_processes=nproc)
    driver.shut_down()
    return {
        "seconds": seconds,
        "peak_host_bytes": loading.bytes - before,
        "held_bytes": held,
        "peak_bytes": max(peak, held),
        "planned": {name: getattr(plan, name) for name in ("weights", "cache", "workspace", "total")},
    }


if __name__ == "__main__":
    sys.exit(answer_requests(measure))
