"""The GPU report: a complete rehearsal on the CPU, and sections that fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.gpu_report import measurements, report, run_tests, whole_steps
from fastllama.benchmarks.gpu_report.markdown import summary
from fastllama.benchmarks.gpu_report.measurements import Bench, Record, Results
from fastllama.benchmarks.gpu_report.sizes import TOY
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, compiling_environment
from fastllama.benchmarks.result_file import ResultFile, read_result
from fastllama.benchmarks.statistics import summarize
from fastllama.decode_graph import Decoder
from fastllama.kernels import fused
from fastllama.kernels.launch.options import launch_options
from tests.support.timeouts import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
FAULTY = "tests.benchmarks.gpu_report.failing_sections:"


@pytest.mark.slow
def test_everything_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastllama.benchmarks.gpu_report", "--results", str(tmp_path), "--json"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--commit", "abc"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "summary.md", "gpu-tests.txt"}
    result = read_result(tmp_path / "report.json")
    assert json.loads(done.stdout.splitlines()[-1]) == result.to_json()
    assert result.ceilings.keys() == {"read", "read_kernel", "copy", "matmul"}
    assert not [record for record in result.records if "error" in record], done.stderr
    suites: dict[str, list[Record]] = {}
    for record in result.records:
        suites.setdefault(record["suite"], []).append(record)
    names = list(suites)
    assert names == [name for name in report.SECTIONS if name != "ceilings"]
    assert names[:4] == ["self-check", "boundaries", "tests", "launches"]
    assert names[-3:] == ["kernel tests", "variants", "quantised variants"], "what takes all the time left comes last"
    assert [record["tests"] for record in suites["tests"]] == ["tests/fastllama/test_gpu.py", "tests/gpu"]
    assert all((one["returncode"], one["n_passed"], one["n_failed"]) == (0, 0, 0) for one in suites["tests"])
    assert sum(one["n_skipped"] for one in suites["tests"]) > 100
    first, *checks = suites["self-check"]
    assert first["check"] == "compiled ahead" and len(checks) == 8
    assert all(record["equal"] and not record["dependent"] for record in checks)
    steps = suites["whole step"]
    assert [(record["batch"], record["attention_pairs"]) for record in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(record["step_microseconds"] > 0 < record["sum_of_launches_microseconds"] for record in steps)
    launches = suites["launches"]
    assert {record["launch"] for record in launches} >= {"embed", "qkv", "attention", "gate+up", "head", "sampling"}
    assert all(record["microseconds"] > record["least_microseconds"] >= 0 for record in launches)
    assert all(record["share"] > 0 for record in suites["decode"])
    page = (tmp_path / "summary.md").read_text()
    assert "A rehearsal on a CPU" in page and "## A decode step, launch by launch" in page


def run(tmp_path: Path, *names: str, budget: float = 120.0) -> list[Record]:
    """The records of a report with sections of `failing_sections`."""
    sections = {name: FAULTY + name for name in names}
    result = report.report(tmp_path, sections, budget)
    assert read_result(tmp_path / "report.json") == result
    return result.records


def records_of(results: Results) -> list[Record]:
    """The records that a section yields, without ceilings."""
    return [record for record in results if isinstance(record, dict)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(torch.device("cpu"), TOY, tmp_path)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_section_that_raises_or_crashes_does_not_affect_the_others(tmp_path: Path) -> None:
    assert run(tmp_path, "raises", "crashes", "fine") == [
        {"suite": "raises", "value": 3},
        {"suite": "raises", "error": "ValueError: it broke"},
        {"suite": "crashes", "value": 4},
        {"suite": "crashes", "error": "its process ended with code 3"},
        {"suite": "fine", "value": 1},
        {"suite": "fine", "value": 2},
    ]
    page = (tmp_path / "summary.md").read_text()
    assert "**ValueError: it broke**" in page and "ended with code 3" in page


def advance_clock(monkeypatch: pytest.MonkeyPatch, after: dict[Any, float]) -> None:
    """Advance the report's clock by the seconds in `after` when a value is found, so that no test has to wait."""
    ahead, add = [0.0], report._ReportWriter.add

    def added(self: Any, section: str, found: Any) -> None:
        add(self, section, found)
        ahead[0] += after.get(found.get("value"), 0.0)

    monkeypatch.setattr(report._ReportWriter, "add", added)
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0]))


def test_hanging_sections_and_sections_without_time_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance_clock(monkeypatch, after={5: report.TIMEOUT_SECONDS, 6: 1e6})
    records = run(tmp_path, "hangs", "fine", "never_ends", "raises", budget=1e5)
    assert records == [
        {"suite": "hangs", "value": 5},
        {"suite": "hangs", "error": "no result for 240 s"},
        {"suite": "fine", "value": 1},
        {"suite": "fine", "value": 2},
        {"suite": "never_ends", "value": 6},
        {"suite": "never_ends", "not_run": "no time left for the rest"},
        {"suite": "raises", "not_run": "no time left"},
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "decode,speed"], "unknown section 'speed': expected some of self-check, ceilings"),
        (["--budget", "0"], "--budget must be above 0, got 0"),
        (["--results", f"{__file__}/under"], "cannot make the folder"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main(["--results", str(tmp_path / "results"), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_summary_names_the_best_launch_beside_the_tables() -> None:
    def variant(op: str, name: str, microseconds: float | None, in_table: bool = False) -> dict[str, Any]:
        case = {"suite": "variants", "model": "8B", "batch": 1, "op": op}
        return {**case, "variant": name, "in_table": in_table, "microseconds": microseconds}

    ceiling = Ceiling("read", "GB/s", "a kernel", summarize([4500.0]))
    records = [
        variant("qkv", "rows 2", 12.5, in_table=True),
        variant("qkv", "rows 4", 11.25),
        variant("qkv", "rows 8", None),
        variant("qkv", "the library's matmul", 14.0),
        variant("down", "rows 1", None, in_table=True),
        {"suite": "self-check", "check": "compiled ahead", "seconds": 2.5},
        {"suite": "self-check", "check": "a graph", "equal": True},
    ]
    page = summary(ResultFile(describe_environment("cpu"), {"read": ceiling}, records, interrupted=True))
    assert "| 8B | 1 | qkv | rows 2 | 12.5 | rows 4 | 11.25 | 14 |" in page
    assert "| 8B | 1 | down |  |  |  |  |  |" in page
    assert "| check | seconds | equal |" in page and "| a graph |  | True |" in page
    assert "| read | 4500 | 4500 | 4500 | GB/s | a kernel |" in page and "Interrupted." in page


def test_without_ceilings_no_measurement_is_lost(bench: Bench) -> None:
    records: list[Record] = []
    for section in (measurements.launches, measurements.decode, measurements.prefills):
        found = [{"suite": section.__name__, **record} for record in records_of(section(bench))]
        assert found and all(one.get("microseconds", one.get("milliseconds", 1)) > 0 for one in found)
        names = ("least_microseconds", "least_milliseconds", "share", "share_of_matmul")
        assert all(one.get(name) is None for one in found for name in names)
        records += found
    page = summary(ResultFile(describe_environment("cpu"), {}, records))
    assert "**Without ceilings, least times and shares are not known.**" in page and "| all |" in page


def test_a_failed_self_check_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([[[1, 2]], [[1, 2]], [[1, 3]], [[1, 2]]])
    monkeypatch.setattr(whole_steps, "_greedy", lambda *_, **__: next(answers, [[1, 2]]))
    records = records_of(whole_steps.self_check(bench))
    assert [record["equal"] for record in records if "equal" in record] == [True, False, *[True] * 6]
    (failed,) = (record for record in records if "error" in record)
    assert failed["error"] == (
        "SELF-CHECK FAILED, so the results below are unreliable: ordinary launches in a graph give [[1, 3]], ordinary "
        "launches, one by one [[1, 2]]"
    )


def test_a_self_check_records_that_dependent_launches_were_replaced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(decoder: Decoder, n_rows: int) -> list[list[int]]:
        if decoder.graphs.use_graphs is None and n_rows == 1:
            decoder.graphs.dependent = False  # like a capture that fails
        return [[1, 2]]

    monkeypatch.setattr(whole_steps, "_greedy", greedy)
    monkeypatch.setattr(fused, "uses_dependent_launch", lambda: launch_options().dependent)
    found = records_of(whole_steps.self_check(bench))
    errors = [place for place, record in enumerate(found) if "error" in record]
    assert [found[place]["error"] for place in errors] == [
        f"SELF-CHECK FAILED: {name} (1 rows) could not be captured and were replaced by ordinary ones: stderr says why"
        for name in ("dependent launches in a graph", "kernels in float32")
    ]
    assert all(found[place - 1]["equal"] and not found[place - 1]["dependent"] for place in errors)


def test_the_first_sections_have_shorter_timeouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(report.FIRST_TIMEOUTS_SECONDS, "hangs", 60.0)
    advance_clock(monkeypatch, after={5: 60.0})
    records = run(tmp_path, "hangs", budget=1e5)
    assert records[1:] == [{"suite": "hangs", "error": "no result for 60 s"}]


def test_missing_tests_are_not_run(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    missing = [{"not_run": f"no {path} beside the package"} for path, _ in run_tests.GPU_TESTS]
    assert list(run_tests.gpu_tests(bench)) == missing
    monkeypatch.setattr(run_tests, "NEEDED", ("pytest", "no_such_plugin"))
    assert list(run_tests.gpu_tests(bench)) == 2 * [{"not_run": "no_such_plugin not installed"}]


def test_tests_that_fail_or_take_too_long_are_recorded(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_fast.py").write_text("def test_good():\n    pass\n\n\ndef test_bad():\n    assert 1 == 2\n")
    begun = tmp_path / "begun"
    slow = f"def test_slow():\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(3600)\n"
    (tmp_path / "test_slow.py").write_text("import pathlib, time\n\n\n" + slow)

    class UntilBegun(subprocess.Popen[bytes]):
        """A process whose timeout ends as soon as the slow test has begun."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            deadline = time.monotonic() + HANG_SECONDS
            while not begun.exists() and time.monotonic() < deadline and self.poll() is None:
                time.sleep(0.05)
            return super().wait(0.0)

    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", UntilBegun)
        (record,) = records_of(run_tests._tests(bench, ("test_fast.py", "test_slow.py"), limit=HANG_SECONDS))
    assert (record["n_passed"], record["n_failed"], record["returncode"]) == (1, 1, None)
    assert "test_bad FAILED" in (tmp_path / report.TESTS_FILE).read_text()
    (record,) = records_of(run_tests._tests(bench, ("test_fast.py",), limit=HANG_SECONDS))
    assert (record["n_passed"], record["n_failed"], record["returncode"]) == (1, 1, 1)
    assert record["failures"] == ["test_fast.py::test_bad"]


@pytest.mark.parametrize(("device", "n_all"), [("cuda", 1), ("cpu", 0)])
def test_slow_tests_run_where_kernels_are_compiled(
    device: str, n_all: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(run_tests, "_run", lambda command, *_: commands.append(command))
    list(run_tests._tests(Bench(torch.device(device), TOY, tmp_path), run_tests.KERNEL_TESTS, 1.0))
    assert [command.count("--all") for command in commands] == [n_all]


@pytest.mark.slow
def test_kernels_are_compiled_ahead_without_a_gpu(tmp_path: Path) -> None:
    script = (
        "from fastllama.benchmarks.gpu_report.whole_steps import CHECKED\n"
        "from fastllama.benchmarks.gpu_report.run_tests import compile_step\n"
        "from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS\n"
        "print(compile_step(GPUS['sm_90'], CHECKED, 1))"
    )
    command, environment = [sys.executable, "-c", script], compiling_environment(str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(5 * 2 + 4), done.stderr
    assert list(tmp_path.rglob("*.cubin")) and GPUS["sm_90"].arch == 90
