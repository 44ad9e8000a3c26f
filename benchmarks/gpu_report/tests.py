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
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import product
from pathlib import Path

import torch

from fastllama.benchmarks.gpu_report.report import TESTS_FILE
from fastllama.benchmarks.gpu_report.sections import Bench, Found
from fastllama.benchmarks.kernels_report.ahead_of_time import Gpu, recorded
from fastllama.benchmarks.kernels_report.model_launches import Shape, prefill_ops, whole_step
from fastllama.kernels.launch.options import override_launch_options
from fastllama.kernels.launch.target import current_target

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("pytest", "pytest_timeout", "hypothesis")
# Each with the seconds that it may take, the most telling first: the whole model, from prompts to tokens.
GPU_TESTS = (("tests/fastllama/test_gpu.py", 90.0), ("tests/gpu", 100.0))
KERNEL_TESTS = ("tests/fastllama/test_fused.py", "tests/kernels")
KERNEL_TESTS_SECONDS = 180.0
NEED_NO_GPU = "tests/kernels/test_compiled.py"  # and takes minutes
COMPILING_SECONDS = 60.0  # beyond the tests
SPARE_SECONDS = 15.0  # of the report's, to say what the tests came to
WORKERS = 8
OUTCOMES = ("passed", "failed", "skipped", "error")
# A test's line as pytest prints it, alone or by a worker of several.
LINE = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] ([A-Z]+) |\S+::.* ([A-Z]+) +\[ *\d+%\]$)", re.MULTILINE)


def gpu_tests(bench: Bench) -> Found:
    """The tests that need a GPU, end to end before kernel by kernel."""
    sizes = bench.sizes
    with compiling(bench, sizes.models.values(), sizes.batches, [(True, True), (True, False), (False, False)]):
        for path, seconds in GPU_TESTS:
            yield from _tests(bench, (path,), seconds)


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
    lenient = ("-W", "default::DeprecationWarning", "-W", "default::FutureWarning")
    command = [sys.executable, "-m", "pytest", "-v", *lenient, "-p", "no:cacheprovider", *paths]
    command += ["--ignore", NEED_NO_GPU]
    command += ["--all"] if bench.device.type == "cuda" else []  # slow as they are where kernels are interpreted
    command += ["-n", str(min(WORKERS, os.cpu_count() or 1))] if several else []
    start = time.perf_counter()
    with (bench.results / TESTS_FILE).open("a+", encoding="utf-8") as file:
        file.write(f"$ python {' '.join(command[1:])}\n")
        file.flush()
        begin = file.tell()
        code = _run(command, file.fileno(), min(limit, bench.end - time.monotonic() - SPARE_SECONDS))
        file.seek(begin)
        printed = file.read()
    counted = Counter((alone or by_worker).lower() for by_worker, alone in LINE.findall(printed))
    yield {
        "tests": " ".join(paths),
        **{f"n_{outcome}": counted[outcome] for outcome in OUTCOMES},
        "returncode": code,
        "seconds": time.perf_counter() - start,
        "failures": sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE))),
        "file": TESTS_FILE,
    }


def _run(command: list[str], output: int, limit: float) -> int | None:
    """The command's exit code; None where it had to be stopped, with all that it started."""
    with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as child:
        try:
            return child.wait(max(limit, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def compiling(
    bench: Bench,
    shapes: Collection[Shape],
    batches: Sequence[int],
    switches: Sequence[tuple[bool, bool]],
    prefills: bool = True,
) -> Iterator[None]:
    """Compile decode steps, and prefills, of these models meanwhile, into triton's cache; at its end all are.

    switches: (dependent launch, prefetch) of each kind of step.
    """
    if bench.device.type != "cuda":
        yield
        return
    gpu = gpu_of(bench.device)
    context = multiprocessing.get_context("spawn")
    n_workers = max(1, (os.cpu_count() or 1) // 2)  # the tests take the other half
    workers = ProcessPoolExecutor(n_workers, mp_context=context, max_tasks_per_child=1)
    tasks = [workers.submit(compile_step, gpu, *how, *on) for on in switches for how in product(shapes, batches)]
    tasks += [workers.submit(compile_prefill, gpu, shape) for shape in shapes if prefills]
    try:
        yield
        # What follows is timed: nothing should be compiling meanwhile.
        done, late = wait(tasks, timeout=min(COMPILING_SECONDS, bench.end - time.monotonic() - SPARE_SECONDS))
        failed = [error for task in done if (error := task.exception()) is not None]
        if late or failed:
            print(f"compiled ahead: {len(done)} of {len(tasks)}, failed: {failed}", file=sys.stderr, flush=True)
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
    with (
        recorded(gpu) as launches,
        override_launch_options(dependent=launch, prefetch=prefetch),
        torch.inference_mode(),
    ):
        whole_step(shape, batch)()
        return len(launches)


def compile_prefill(gpu: Gpu, shape: Shape) -> int:
    """The same of the kernels around a prefill's matmuls."""
    with recorded(gpu) as launches, torch.inference_mode():
        for _, call in prefill_ops(shape):
            call()
        return len(launches)
