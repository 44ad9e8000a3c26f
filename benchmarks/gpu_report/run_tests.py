"""Sections of a GPU report that run the tests in another process and write their output to a file.

Meanwhile other processes compile the kernels of the following sections, so that these sections compile little.
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

from fastllama.args import ModelArgs
from fastllama.benchmarks.gpu_report.measurements import Bench, Results
from fastllama.benchmarks.gpu_report.quantized_models import FORMATS as MODEL_FORMATS
from fastllama.benchmarks.gpu_report.quantized_weights import supported_formats
from fastllama.benchmarks.gpu_report.report import TESTS_FILE
from fastllama.benchmarks.gpu_report.sizes import ends
from fastllama.benchmarks.kernels_report.ahead_of_time import record_launches
from fastllama.benchmarks.kernels_report.model_launches import prefill_ops, whole_step
from fastllama.kernels.launch.options import override_launch_options
from fastllama.kernels.launch.target import Target, current_target

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("pytest", "pytest_timeout", "hypothesis")
# (path, limit in seconds). The tests of the complete model come first, because they cover most.
GPU_TESTS = (("tests/fastllama/test_gpu.py", 90.0), ("tests/gpu", 100.0))
KERNEL_TESTS = (
    *("tests/fastllama/test_fused.py", "tests/kernels"),
    "tests/benchmarks/gpu_report/test_instruction_rates.py",
)
KERNEL_TESTS_SECONDS = 180.0
NEED_NO_GPU = "tests/kernels/test_compiled.py"  # not run, because it takes minutes
COMPILING_SECONDS = 60.0  # after the tests have ended
SPARE_SECONDS = 15.0  # before the report's end, when tests are stopped
WORKERS = 8
OUTCOMES = ("passed", "failed", "skipped", "error")
# A test's result as pytest prints it, without or with parallel workers.
LINE = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] ([A-Z]+) |\S+::.* ([A-Z]+) +\[ *\d+%\]$)", re.MULTILINE)


def gpu_tests(bench: Bench) -> Results:
    """Runs the tests that need a GPU, those of the complete model first, while kernels are compiled."""
    sizes = bench.sizes
    options = [(True, True), (True, False), (False, False)]
    formats = supported_formats(bench.device, MODEL_FORMATS)
    batches = list(dict.fromkeys((*sizes.batches, *sizes.requests_at_a_time)))
    with compile_ahead(bench, sizes.models.values(), batches, options, formats=formats):
        for path, seconds in GPU_TESTS:
            yield from _tests(bench, (path,), seconds)


def kernel_tests(bench: Bench) -> Results:
    """Runs the tests of kernels with compiled kernels. Without a GPU the same tests interpret them."""
    if bench.device.type == "cuda":
        yield from _tests(bench, KERNEL_TESTS, KERNEL_TESTS_SECONDS)
    else:
        yield {"not_run": "on a CPU they are interpreted, by `make test`"}


def _tests(bench: Bench, paths: tuple[str, ...], limit: float) -> Results:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing or not (ROOT / paths[0]).exists():
        yield {"not_run": f"{', '.join(missing)} not installed" if missing else f"no {paths[0]} beside the package"}
        return
    several = bench.device.type == "cuda" and importlib.util.find_spec("xdist") is not None
    # Other versions of the dependencies may deprecate more, which is not a failure.
    lenient = ("-W", "default::DeprecationWarning", "-W", "default::FutureWarning")
    command = [sys.executable, "-m", "pytest", "-v", *lenient, "-p", "no:cacheprovider", *paths]
    command += ["--ignore", NEED_NO_GPU]
    command += ["--all"] if bench.device.type == "cuda" else []  # too slow with interpreted kernels
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
    """The command's exit code; None if it was stopped, with its child processes, after `limit` seconds."""
    with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as child:
        try:
            return child.wait(max(limit, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def compile_ahead(
    bench: Bench,
    models: Collection[ModelArgs],
    batches: Sequence[int],
    options: Sequence[tuple[bool, bool]],
    prefills: bool = True,
    formats: Sequence[str] = (),
) -> Iterator[None]:
    """During the block, other processes compile decode steps and prefills of these models into triton's cache.

    The end of the block waits for them. options: (dependent launch, prefetch) of each kind of step. formats: of
    quantised weights, with which steps are compiled, too.
    """
    if bench.device.type != "cuda":
        yield
        return
    with torch.cuda.device(bench.device):
        target = current_target()
    context = multiprocessing.get_context("spawn")
    n_workers = max(1, (os.cpu_count() or 1) // 2)  # the tests take the other half
    workers = ProcessPoolExecutor(n_workers, mp_context=context, max_tasks_per_child=1)
    tasks = [workers.submit(compile_step, target, *case, *on) for on in options for case in product(models, batches)]
    tasks += [workers.submit(compile_prefill, target, args) for args in models if prefills]
    for quantize, args, batch in product(formats, models, ends(batches)):
        tasks.append(workers.submit(compile_step, target, args, batch, quantize=quantize))
    try:
        yield
        # Nothing should compile while the following sections are timed.
        done, late = wait(tasks, timeout=min(COMPILING_SECONDS, bench.end - time.monotonic() - SPARE_SECONDS))
        failed = [error for task in done if (error := task.exception()) is not None]
        if late or failed:
            print(f"compiled ahead: {len(done)} of {len(tasks)}, failed: {failed}", file=sys.stderr, flush=True)
    finally:
        workers.shutdown(wait=False, cancel_futures=True)


def compile_step(
    target: Target,
    args: ModelArgs,
    batch: int,
    dependent: bool = True,
    prefetch: bool = True,
    quantize: str | None = None,
) -> int:
    """Compile a decode step's kernels into triton's cache, which needs no GPU. Returns the number of launches."""
    options = override_launch_options(dependent=dependent, prefetch=prefetch)
    with record_launches(target) as launches, options, torch.inference_mode():
        whole_step(args, batch, quantize=quantize)()
        return len(launches)


def compile_prefill(target: Target, args: ModelArgs) -> int:
    """Compile the kernels around a prefill's matmuls in the same way."""
    with record_launches(target) as launches, torch.inference_mode():
        for _, call in prefill_ops(args):
            call()
        return len(launches)
