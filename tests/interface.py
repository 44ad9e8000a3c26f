"""The public interface as text: every command's `--help`, every public signature, every key of a result file.

`tests/data/interface.txt` holds it. After an intended change, `python -m tests.interface` rewrites the file, and its
diff is reviewed.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from fastllama.cli import main

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "tests" / "data" / "interface.txt"
MODULES = ("fastllama", "fastllama.args", "fastllama.generation", "fastllama.model", "fastllama.tokenizer")
COMMANDS = (
    "fastllama",
    "fastllama complete",
    "fastllama chat",
    "fastllama batch",
    "fastllama inspect",
    "fastllama quantize",
    "fastllama quality",
    "fastllama bench",
    "fastllama bench compare",
    "fastllama.benchmarks.gpu_report",
    "fastllama.benchmarks.kernels_report",
    "fastllama.builtin.train",
)
WIDTH = 98  # of the lines in a terminal of 100 columns
SUITES = "kernels,decode,prefill,generate,requests,memory"
BENCH = ("--batch", "2", "--context", "4", "--steps", "3", "--rounds", "1", "--device", "cpu", "--threads", "1")
# A generated model, compared with a peer; and a model that is read from files.
RUNS = (("--suite", SUITES, "--model", "random-toy", "--peers", "reference"), ("--suite", "load", "--peers", "none"))
PERCENTILES = {"count", "minimum", "p10", "p50", "p90", "p99", "maximum"}


def helps() -> Iterator[str]:
    """What each command prints for `--help`, without its line breaks. Those of `fastllama` run in this process."""
    for command in COMMANDS:
        module, *words = command.split()
        if module == "fastllama":
            text = CliRunner().invoke(main, [*words, "--help"], prog_name="fastllama", terminal_width=WIDTH).stdout
        else:
            started = [sys.executable, "-m", module, "--help"]
            environment = {**os.environ, "COLUMNS": "100"}
            done = subprocess.run(started, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
            text = done.stdout
        yield f"{command} --help: {' '.join(text.split())}"


def signatures() -> Iterator[str]:
    """Every public function, class and method of the modules that Meta's package has, and of the package itself."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", vars(module))):
            value = getattr(module, name)
            own = getattr(value, "__module__", "") == module_name or hasattr(module, "__all__")
            if name.startswith("_") or not own or not callable(value):
                continue
            yield f"{module_name}.{name}{_signature(value)}"
            if inspect.isclass(value) and module_name != "fastllama":
                bases = [base for base in value.__mro__ if base.__module__.startswith("fastllama")]
                members = {member for base in bases for member in vars(base) if not member.startswith("_")}
                methods = ((member, getattr(value, member)) for member in sorted(members))
                yield from (f"{module_name}.{name}.{m}{_signature(f)}" for m, f in methods if callable(f))


def result_keys() -> Iterator[str]:
    """Every key of a result file, by the suite of its record. The keys of every peer are `peers.*`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        for run in RUNS:
            command = [sys.executable, "-m", "fastllama", "bench", *BENCH, *run, "--no_plots", "--output", str(path)]
            subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
            result = json.loads(path.read_text())
            for record in result.pop("records"):
                record["peers"] = {"*": list(record["peers"].values())}
                yield from (f"result {record['suite']}: {key}" for key in _keys(record))
            yield from (f"result: {key}" for key in _keys(result))


def lines(parts: Iterator[str]) -> list[str]:
    """The lines without duplicates, sorted."""
    return sorted(set(parts))


def _signature(value: Any) -> str:
    """Parameters with their kinds and defaults, without types, which mypy checks."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    empty = inspect.Signature.empty
    plain = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=empty))


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value.keys() != PERCENTILES:
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from _keys(inner, f"{prefix}{key}.")
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner, prefix)


if __name__ == "__main__":
    found = lines(helps()) + lines(signatures()) + lines(result_keys())
    SNAPSHOT.write_text("\n".join(found) + "\n")
