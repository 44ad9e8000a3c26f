"""The tests as a section of a GPU report: in a process of their own, into a file of their own.

While they run, other processes compile the kernels that the following sections launch, so that little of the time with
the GPU goes into compiling.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from fastllama.benchmarks.gpus import Gpu, recorded
from fastllama.benchmarks.launches import Shape, prefill_ops, whole_step
from fastllama.benchmarks.report_sections import Bench, Found
from fastllama.kernels.dependent import switched
from fastllama.kernels.target import current_target

ROOT = Path(__file__).resolve().parents[1]
FILE = "gpu-tests.txt"
NEEDED = ("pytest", "pytest_timeout", "hypothesis")
GPU_TESTS = ("tests/gpu", "tests/fastllama/test_gpu.py")
KERNEL_TESTS = ("tests/kernels", "tests/fastllama/test_fused.py")
GPU_TESTS_SECONDS, KERNEL_TESTS_SECONDS = 150.0, 240.0
WORKERS = 8  # with a share of the GPU's memory each
OUTCOMES = ("passed", "failed", "skipped", "error")


def gpu_tests(bench: Bench) -> Found:
    """The tests that need a GPU."""
    with _compiling(bench):
        yield from _tests(bench, GPU_TESTS, GPU_TESTS_SECONDS)


def kernel_tests(bench: Bench) -> Found:
    """The tests of kernels, compiled: the same that are interpreted where there is no GPU."""
    if bench.device.type == "cuda":
        yield from _tests(bench, KERNEL_TESTS, KERNEL_TESTS_SECONDS)
    else:
        yield {"not_run": "on a CPU they are interpreted, by `make test`"}


def _tests(bench: Bench, paths: tuple[str, ...], limit: float) -> Found:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing or not (ROOT / paths[0]).exists():
        yield {"not_run": f"{', '.join(missing)} not installed" if missing else f"no {paths[0]} beside the package"}
        return
    several = bench.device.type == "cuda" and importlib.util.find_spec("xdist") is not None
    # Another machine's versions may deprecate what ours do not: that is no failure there.
    command = [sys.executable, "-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider", *paths]
    command += ["-n", str(min(WORKERS, os.cpu_count() or 1))] if several else []
    start = time.perf_counter()
    with (bench.results / FILE).open("a+", encoding="utf-8") as file:
        file.write(f"$ python {' '.join(command[1:])}\n")
        file.flush()
        begin = file.tell()
        code = _run(command, file.fileno(), limit)
        file.seek(begin)
        printed = file.read()
    counted = {word: int(number) for number, word in re.findall(rf"(\d+) ({'|'.join(OUTCOMES)})", _last_line(printed))}
    yield {
        "tests": " ".join(paths),
        **{f"n_{outcome}": counted.get(outcome, 0) for outcome in OUTCOMES},
        "returncode": code,
        "seconds": time.perf_counter() - start,
        "failures": sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE))),
        "file": FILE,
    }


def _run(command: list[str], output: int, limit: float) -> int | None:
    """The command's exit code; None where it had to be stopped, with all that it started."""
    with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as child:
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


@contextlib.contextmanager
def _compiling(bench: Bench) -> Iterator[None]:
    """Compile the decode steps and prefills of the sizes meanwhile, into triton's cache."""
    if bench.device.type != "cuda":
        yield
        return
    gpu = gpu_of(bench.device)
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1)
    for shape in bench.sizes.models.values():
        for batch in bench.sizes.batches:
            for launch, prefetch in ((True, True), (True, False), (False, False)):
                workers.submit(compile_step, gpu, shape, batch, launch, prefetch)
        workers.submit(compile_prefill, gpu, shape)
    try:
        yield
    finally:
        workers.shutdown(wait=False, cancel_futures=True)


def gpu_of(device: torch.device) -> Gpu:
    """What the launch tables need to know of a GPU that is here."""
    with torch.cuda.device(device):
        target = current_target()
    name = torch.cuda.get_device_name(device)
    return Gpu(target.backend, target.arch, target.warp_size, target.processors, target.shared_bytes, name)


def compile_step(gpu: Gpu, shape: Shape, batch: int, launch: bool = True, prefetch: bool = True) -> int:
    """Compile a decode step's kernels for a GPU, into triton's cache, and count the launches. Needs no GPU."""
    with recorded(gpu) as launches, switched(launch=launch, prefetch=prefetch), torch.inference_mode():
        whole_step(shape, batch)()
        return len(launches)


def compile_prefill(gpu: Gpu, shape: Shape) -> int:
    """The same of the kernels around a prefill's matmuls."""
    with recorded(gpu) as launches, torch.inference_mode():
        for _, call in prefill_ops(shape):
            call()
        return len(launches)
