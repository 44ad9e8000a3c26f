"""One command for a machine with a GPU: everything worth knowing of this project there, most valuable first.

It needs a checkout and the package's dependencies (torch, triton, psutil, tiktoken, safetensors, tqdm), but no
installation and no network. The sections run in another process, and this one writes each result when it arrives. If a
section fails, hangs or breaks the GPU's context, its earlier results are kept and the next section runs in a new
process. Without a GPU everything runs at toy sizes with interpreted kernels: a rehearsal, whose times mean nothing.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from queue import Empty
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastllama.benchmarks.ceilings import Ceiling
    from fastllama.benchmarks.result_file import ResultFile

BUDGET_SECONDS = 510.0
START_TIMEOUT_SECONDS = 90.0  # until the sections' process sends its first message
TIMEOUT_SECONDS = 240.0  # until a section's next result
# Shorter for the first sections: if they take long, the machine has a problem that would delay the others as well.
FIRST_TIMEOUTS_SECONDS = {"self-check": 90.0, "ceilings": 60.0, "boundaries": 60.0}
POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0  # for the sections' process to stop its own child processes
REPORT_FILE, SUMMARY_FILE, TESTS_FILE = "report.json", "summary.md", "gpu-tests.txt"
# The most valuable first. Each has a function that yields its results.
SECTIONS = {
    "self-check": "fastllama.benchmarks.gpu_report.whole_steps:self_check",
    "ceilings": "fastllama.benchmarks.gpu_report.measurements:ceilings",
    "boundaries": "fastllama.benchmarks.gpu_report.measurements:boundaries",
    "tests": "fastllama.benchmarks.gpu_report.run_tests:gpu_tests",
    "launches": "fastllama.benchmarks.gpu_report.measurements:launches",
    "decode": "fastllama.benchmarks.gpu_report.measurements:decode",
    "engine": "fastllama.benchmarks.gpu_report.many_requests:many_requests",
    "speculation": "fastllama.benchmarks.gpu_report.speculation:speculation",
    "quantised models": "fastllama.benchmarks.gpu_report.quantized_models:quantized_models",
    "whole step": "fastllama.benchmarks.gpu_report.whole_steps:whole_steps",
    "prefill": "fastllama.benchmarks.gpu_report.measurements:prefills",
    "instruction rates": "fastllama.benchmarks.gpu_report.instruction_rates:instruction_rates",
    "quantised weights": "fastllama.benchmarks.gpu_report.quantized_weights:quantized_weights",
    "sampling": "fastllama.benchmarks.gpu_report.measurements:sampling",
    "switches": "fastllama.benchmarks.gpu_report.measurements:switches",
    "kernel tests": "fastllama.benchmarks.gpu_report.run_tests:kernel_tests",
    "variants": "fastllama.benchmarks.gpu_report.launch_search:variants",
    "quantised variants": "fastllama.benchmarks.gpu_report.quantized_search:quantized_variants",
}
ALWAYS = ("self-check", "ceilings")  # the other sections' results cannot be judged without them
PACKAGES = ("torch", "triton", "psutil", "tiktoken", "safetensors", "tqdm", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. It returns 0 even if sections fail: the report has their errors."""
    parser = argparse.ArgumentParser(
        prog="python -m fastllama.benchmarks.gpu_report",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="example: python -m fastllama.benchmarks.gpu_report --results benchmarks/results/h200",
    )
    parser.add_argument("--results", required=True, type=Path, metavar="DIR", help="folder of the result files")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_SECONDS, metavar="S", help="seconds in all (default: %(default)g)"
    )
    parser.add_argument(
        "--sections",
        default=",".join(SECTIONS),
        metavar="NAMES",
        help=f"which of {', '.join(SECTIONS)}; {' and '.join(ALWAYS)} always run, and their order stays (default: all)",
    )
    parser.add_argument("--commit", metavar="HASH", help="the commit, where the checkout comes without its .git")
    parser.add_argument("--json", action="store_true", help="the report's object as the last line of stdout")
    options = parser.parse_args(arguments)
    names = options.sections.split(",")
    for name in names:
        if name not in SECTIONS:
            parser.error(f"unknown section {name!r}: expected some of {', '.join(SECTIONS)}")
    if not options.budget > 0:
        parser.error(f"--budget must be above 0, got {options.budget:g}")
    try:
        options.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make the folder {options.results}: {error.strerror}")
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        parser.error(f"this python lacks {', '.join(missing)}: run with one that has them (make gpu-report PYTHON=...)")
    sections = {name: function for name, function in SECTIONS.items() if name in (*ALWAYS, *names)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = report(options.results, sections, options.budget, options.commit)
    summary = options.results / SUMMARY_FILE
    print(json.dumps(result.to_json(), allow_nan=False) if options.json else summary.read_text())
    return 0


def report(results: Path, sections: Mapping[str, str], budget: float, commit: str | None = None) -> "ResultFile":
    """Run sections ("module:function" by name) and keep the report and its summary in the folder `results` up to date.

    budget: seconds for all. commit: used if the checkout has no .git.
    """
    end = time.monotonic() + budget
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, by the sections' process
        _log("no GPU: toy sizes and interpreted kernels, a rehearsal")

    from fastllama.benchmarks.environment import describe_environment
    from fastllama.benchmarks.result_file import ResultFile

    device = "cuda" if has_gpu else "cpu"
    environment = describe_environment(device)
    writer = _ReportWriter(results, ResultFile(replace(environment, git_commit=environment.git_commit or commit), {}))
    (results / TESTS_FILE).unlink(missing_ok=True)  # of an earlier run
    waiting = list(sections.items())
    try:
        while waiting and time.monotonic() < end:
            waiting = waiting[_run_in_process(device, results, waiting, writer, end) :]
    except KeyboardInterrupt:
        writer.interrupt()
        _log("interrupted: the results so far are kept")
    else:
        for name, _ in waiting:
            writer.add(name, {"not_run": "no time left"})
    return writer.result


class _ReportWriter:
    """The report so far, written to disk after every change."""

    def __init__(self, results: Path, result: "ResultFile") -> None:
        self._results, self.result = results, result
        self._write()

    def add(self, section: str, found: "Ceiling | dict[str, Any]") -> None:
        before = self.result
        if isinstance(found, dict):
            self.result = replace(before, records=[*before.records, {"suite": section, **found}])
        else:
            self.result = replace(before, ceilings={**before.ceilings, found.name: found})
        try:
            self._write()
        except (ValueError, TypeError, KeyError) as error:  # such as a figure that is not finite; the report continues
            self.result = before
            self.add(section, {"error": f"cannot be written: {error!r}, of {found!r}"[:500]})

    def interrupt(self) -> None:
        self.result = replace(self.result, interrupted=True)
        self._write()

    def _write(self) -> None:
        from fastllama.benchmarks.gpu_report.markdown import summary
        from fastllama.benchmarks.result_file import write_result, write_text

        write_result(self.result, self._results / REPORT_FILE)
        write_text(summary(self.result), self._results / SUMMARY_FILE)


def _run_in_process(
    device: str, results: Path, sections: Sequence[tuple[str, str]], writer: _ReportWriter, end: float
) -> int:
    """Run sections in a new process until all are done, one of them ends the process, or time is up.

    Returns the number of finished sections, including the one that ended the process.
    """
    names, functions = zip(*sections, strict=True)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (device, results, functions, dict(writer.result.ceilings), end, queue)
    process = context.Process(target=_run_sections, args=arguments)
    process.start()
    n_done, last_message, timeout, begun = 0, time.monotonic(), START_TIMEOUT_SECONDS, 0.0
    try:
        while n_done < len(names):
            name = names[n_done]
            if time.monotonic() >= end:
                writer.add(name, {"not_run": "no time left for the rest"})
                return n_done + 1
            try:
                kind, found = queue.get(timeout=POLL_SECONDS)
            except Empty:
                if process.is_alive() and time.monotonic() - last_message <= timeout:
                    continue
                silent = f"no result for {timeout:.0f} s"
                error = silent if process.is_alive() else f"its process ended with code {process.exitcode}"
                writer.add(name, {"error": error})
                _log(f"{name}: {error}")
                return n_done + 1
            last_message, timeout = time.monotonic(), FIRST_TIMEOUTS_SECONDS.get(name, TIMEOUT_SECONDS)
            if kind == "begin":
                begun = last_message
                _log(f"{name} ...")
            elif kind == "end":
                _log(f"{name}: {last_message - begun:.0f} s")
                n_done += 1
            else:
                writer.add(name, found)
        return n_done
    finally:
        process.terminate()
        process.join(GRACE_SECONDS)
        process.kill()
        process.join()


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run_sections(
    device: str, results: Path, functions: Sequence[str], ceilings: dict[str, Any], end: float, queue: Any
) -> None:
    """The main function of the sections' process. It puts (kind, result) in the queue."""
    import torch

    from fastllama.benchmarks.gpu_report.measurements import Bench
    from fastllama.benchmarks.gpu_report.sizes import FULL, TOY

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the writing process handles Ctrl-C
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    bench = Bench(torch.device(device), FULL if device == "cuda" else TOY, results, end, ceilings)
    for function in functions:
        queue.put(("begin", None))
        try:
            for found in resolve_name(function)(bench):
                if not isinstance(found, dict):
                    bench.ceilings[found.name] = found
                queue.put(("found", found))
        except Exception as error:
            traceback.print_exc()
            queue.put(("found", {"error": f"{type(error).__name__}: {error}"[:500]}))
            if device == "cuda":
                torch.cuda.synchronize()  # raises and thereby ends this process if the GPU's context is broken
        queue.put(("end", None))
        if device == "cuda":
            torch.cuda.empty_cache()
