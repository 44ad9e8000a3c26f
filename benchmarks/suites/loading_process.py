"""A fresh process that builds a model and answers once, so that its time and memory are those of a program's start."""

import json
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil
import torch

from fastllama.benchmarks.models import ModelSource, described
from fastllama.benchmarks.runner import Ours
from fastllama.benchmarks.suites.comparison import Case
from fastllama.benchmarks.timing import synchronize
from fastllama.distributed import driver
from fastllama.generation import Llama
from fastllama.memory_plan import plan_memory

SAMPLE_SECONDS = 0.002


def own_bytes() -> int:
    """Host memory that this process has for itself: without what it maps from files, which is the page cache's."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


class PeakHostMemory:
    """Watches `own_bytes` while a block runs. A context manager; `bytes` is the most that was seen."""

    def __init__(self) -> None:
        self.bytes = own_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakHostMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, own_bytes())

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, own_bytes())


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Build what the request describes, then answer its prompts. Bytes are beyond those before anything was built."""
    torch.set_num_threads(request["threads"])
    source = ModelSource(**request["source"])
    device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
    case = Case("memory", request["batch"], request["context"], request["steps"])
    max_seq_len = case.context + case.steps
    args = source.args(case.batch, max_seq_len)
    nproc = request["nproc"]
    how = {"device": request["device"], "dtype": request["dtype"], "backend": request["backend"]}
    arguments = {"max_seq_len": max_seq_len, "max_batch_size": case.batch, **how}
    build: Callable[..., Llama] = described
    if source.ckpt_dir is None:
        arguments["source"] = request["source"]
    else:
        build = Llama.build
        arguments |= {"ckpt_dir": source.ckpt_dir, "tokenizer_path": str(source.tokenizer_path)}
    if nproc > 1:
        driver.start_workers(nproc)
        driver.wait_for_workers()
    before = own_bytes()
    synchronize(device)
    start = time.perf_counter()
    with PeakHostMemory() as loading:
        llm = build(**arguments) if nproc == 1 else driver.build_on_all(build, **arguments)
        synchronize(device)
    seconds = time.perf_counter() - start
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else own_bytes() - before
    with PeakHostMemory() as answering:
        Ours(llm).run(case.prompts(args.vocab_size), case.steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else answering.bytes - before
    shares_tied_output = not llm.model.ops.packing_copies(device, dtype)
    plan = plan_memory(args, dtype, case.batch, max_seq_len, shares_tied_output=shares_tied_output, n_processes=nproc)
    driver.shut_down()
    return {
        "seconds": seconds,
        "peak_host_bytes": loading.bytes - before,
        "held_bytes": held,
        "peak_bytes": max(peak, held),
        "planned": {"weights": plan.weights, "cache": plan.cache, "workspace": plan.workspace, "total": plan.total},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.readline()))))
