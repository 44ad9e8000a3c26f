"""One command for a machine with a GPU: everything worth knowing of this project there, most valuable first.

Needs nothing but the checkout and the package's dependencies (torch, triton, psutil, tiktoken, safetensors, tqdm) as
the machine has them: no installation, no network. The sections run in a process of their own and
this one writes what they bring as it comes: one that fails, hangs or takes the GPU down with it costs what it had left
to say, and the next goes on in a new process. On a machine without a GPU everything runs on toy sizes, with kernels
interpreted: a rehearsal, whose times mean nothing.
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
START_SECONDS = 90.0  # for the sections' process to begin
PATIENCE_SECONDS = 240.0  # for the next thing that a section finds
# The first are quick, or something is wrong with the machine that would cost as much again in those that follow.
FIRST_PATIENCE_SECONDS = {"self-check": 90.0, "ceilings": 60.0, "boundaries": 60.0}
POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0  # to stop what the sections' process has started itself
REPORT_FILE, SUMMARY_FILE, TESTS_FILE = "report.json", "summary.md", "gpu-tests.txt"
# In order of value, with the function of each.
SECTIONS = {
    "self-check": "fastllama.benchmarks.gpu_report.steps:self_check",
    "ceilings": "fastllama.benchmarks.gpu_report.sections:ceilings",
    "boundaries": "fastllama.benchmarks.gpu_report.sections:boundaries",
    "tests": "fastllama.benchmarks.gpu_report.tests:gpu_tests",
    "launches": "fastllama.benchmarks.gpu_report.sections:launches",
    "decode": "fastllama.benchmarks.gpu_report.sections:decode",
    "whole step": "fastllama.benchmarks.gpu_report.steps:whole_steps",
    "prefill": "fastllama.benchmarks.gpu_report.sections:prompts",
    "sampling": "fastllama.benchmarks.gpu_report.sections:sampling",
    "switches": "fastllama.benchmarks.gpu_report.sections:switches",
    "kernel tests": "fastllama.benchmarks.gpu_report.tests:kernel_tests",
    "variants": "fastllama.benchmarks.gpu_report.variants:variants",
}
ALWAYS = ("self-check", "ceilings")  # by which all others are to be judged
PACKAGES = ("torch", "triton", "psutil", "tiktoken", "safetensors", "tqdm", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0 also where sections failed: what they said stands in the report."""
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
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not options.budget > 0:
        parser.error(
            f"unknown section {unknown[0]!r}: expected some of {', '.join(SECTIONS)}"
            if unknown
            else f"--budget must be above 0, got {options.budget:g}"
        )
    try:
        options.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make the folder {options.results}: {error.strerror}")
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        parser.error(f"this python lacks {', '.join(missing)}: run with one that has them (make gpu-report PYTHON=...)")
    sections = {name: function for name, function in SECTIONS.items() if name in (*ALWAYS, *names)}
    signal.signal(signal.SIGTERM, _interrupt)
    result = report(options.results, sections, options.budget, options.commit)
    print(
        json.dumps(result.to_json(), allow_nan=False) if options.json else (options.results / SUMMARY_FILE).read_text()
    )
    return 0


def report(results: Path, sections: Mapping[str, str], budget: float, commit: str | None = None) -> "ResultFile":
    """Run sections ("module:function" by name), keeping the report and its summary in the folder `results` up to date.

    budget: seconds in all. commit: where it cannot be found out.
    """
    end = time.monotonic() + budget
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, by the sections' process
        _say("no GPU: toy sizes and interpreted kernels, a rehearsal")

    from fastllama.benchmarks.environment import describe_environment
    from fastllama.benchmarks.result_file import ResultFile

    device = "cuda" if has_gpu else "cpu"
    environment = describe_environment(device)
    keeper = _Keeper(results, ResultFile(replace(environment, git_commit=environment.git_commit or commit), {}))
    (results / TESTS_FILE).unlink(missing_ok=True)  # of an earlier run
    waiting = list(sections.items())
    try:
        while waiting and time.monotonic() < end:
            waiting = waiting[_Sections(device, results, waiting, keeper, end).run() :]
    except KeyboardInterrupt:
        keeper.interrupt()
        _say("interrupted: what was found stays")
    else:
        for name, _ in waiting:
            keeper.add(name, {"not_run": "no time left"})
    return keeper.result


class _Keeper:
    """The report so far, on disk after every change."""

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
        except (ValueError, TypeError, KeyError) as error:  # a figure that is not finite, say: no reason to stop
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


class _Sections:
    """Sections in a process of their own, as this one follows them."""

    def __init__(
        self, device: str, results: Path, sections: Sequence[tuple[str, str]], keeper: _Keeper, end: float
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._names, self._keeper, self._end = [name for name, _ in sections], keeper, end
        self._queue = context.Queue()
        functions = [function for _, function in sections]
        arguments = (device, results, functions, dict(keeper.result.ceilings), end, self._queue)
        self._process = context.Process(target=_work, args=arguments)

    def run(self) -> int:
        """Until they are done, one of them ends the process, or time is up -> how many are over with."""
        self._process.start()
        over, heard, patience, begun = 0, time.monotonic(), START_SECONDS, 0.0
        try:
            while over < len(self._names):
                name = self._names[over]
                if time.monotonic() >= self._end:
                    self._keeper.add(name, {"not_run": "no time left for the rest"})
                    return over + 1
                try:
                    kind, found = self._queue.get(timeout=POLL_SECONDS)
                except Empty:
                    if lost := self._lost(heard, patience):
                        self._keeper.add(name, {"error": lost})
                        _say(f"{name}: {lost}")
                        return over + 1
                    continue
                heard, patience = time.monotonic(), FIRST_PATIENCE_SECONDS.get(name, PATIENCE_SECONDS)
                if kind == "begin":
                    begun = heard
                    _say(f"{name} ...")
                elif kind == "end":
                    _say(f"{name}: {heard - begun:.0f} s")
                    over += 1
                else:
                    self._keeper.add(name, found)
            return over
        finally:
            self._process.terminate()
            self._process.join(GRACE_SECONDS)
            self._process.kill()
            self._process.join()

    def _lost(self, heard: float, patience: float) -> str | None:
        """Why there is nothing more to wait for."""
        if not self._process.is_alive():
            return f"its process ended with code {self._process.exitcode}"
        if time.monotonic() - heard > patience:
            return f"nothing came for {patience:.0f} s"
        return None


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _work(
    device: str, results: Path, functions: Sequence[str], ceilings: dict[str, Any], end: float, queue: Any
) -> None:
    """The sections' process: (kind, what was found) for each thing that they bring."""
    import torch

    from fastllama.benchmarks.gpu_report.sections import Bench
    from fastllama.benchmarks.gpu_report.sizes import FULL, TOY

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes
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
                torch.cuda.synchronize()  # raises where the error took the GPU's context with it: a new process, then
        queue.put(("end", None))
        if device == "cuda":
            torch.cuda.empty_cache()
