"""Statistics, ceilings, environment and result files. Nothing here asserts how fast anything is."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch

from fastllama.benchmarks import ceilings
from fastllama.benchmarks.ceilings import Ceiling, MatmulProbe, ReadProbe, copy_ceiling
from fastllama.benchmarks.environment import describe_environment, git_state
from fastllama.benchmarks.result_file import SCHEMA_VERSION, ResultFile, read_result, write_result
from fastllama.benchmarks.statistics import percentile, summarize
from fastllama.benchmarks.timing import Contention, time_calls

CPU = torch.device("cpu")
SMALL_BUFFER_BYTES = 2**16


def result_file() -> ResultFile:
    ceiling = Ceiling("read", "GB/s", "a guess", summarize([1.0, 2.0, 4.0]))
    return ResultFile(describe_environment(CPU), {"read": ceiling}, [{"suite": "decode", "batch": 1}])


@pytest.mark.parametrize(("percent", "expected"), [(0, 10.0), (25, 12.5), (50, 15.0), (90, 19.0), (100, 20.0)])
def test_percentile_interpolates_between_neighbours(percent: float, expected: float) -> None:
    assert percentile([20.0, 10.0], percent) == pytest.approx(expected)


def test_percentile_of_one_sample_is_that_sample() -> None:
    assert [percentile([3.0], percent) for percent in (0, 50, 99)] == [3.0, 3.0, 3.0]


def test_percentile_rejects_no_samples_and_odd_percents() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], 101)


def test_summarize_orders_and_spreads() -> None:
    summary = summarize(float(value) for value in range(100, -1, -1))
    assert (summary.count, summary.minimum, summary.maximum) == (101, 0.0, 100.0)
    assert (summary.p10, summary.p50, summary.p90, summary.p99) == (10.0, 50.0, 90.0, 99.0)
    assert summary.spread == pytest.approx(1.6)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_summarize_rejects_what_has_no_summary(samples: list[float]) -> None:
    with pytest.raises(ValueError):
        summarize(samples)


def test_time_calls_counts_warm_up_apart() -> None:
    calls: list[int] = []
    times = time_calls(lambda: calls.append(1), device=CPU, warmup=3, repeats=5)
    assert (len(times), len(calls)) == (5, 8)
    assert all(second >= 0 for second in times)


def test_time_calls_goes_on_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that moves by one second at each look: a call takes one, the looks around it two more.
    ticks = iter(range(1000))
    monkeypatch.setattr("fastllama.benchmarks.timing.time.perf_counter", lambda: float(next(ticks)))
    times = time_calls(lambda: None, device=CPU, warmup=0, repeats=2, seconds=30.0)
    assert set(times) == {1.0}
    assert len(times) == 11


def test_ceilings_are_positive_and_say_how() -> None:
    probe = ReadProbe(CPU, SMALL_BUFFER_BYTES)
    first = probe.sample(0.0)
    probe.sample(0.0)
    read = probe.ceiling()
    assert read.samples.count == 2 * first.count
    copied = copy_ceiling(CPU, SMALL_BUFFER_BYTES, seconds=0.0)
    products = MatmulProbe(CPU, torch.float32, size=16)
    products.sample(0.0)
    multiplied = products.ceiling()
    assert [ceiling.unit for ceiling in (read, copied, multiplied)] == ["GB/s", "GB/s", "TFLOP/s"]
    assert all(ceiling.value > 0 for ceiling in (read, copied, multiplied))
    assert probe.method in read.method and "float32" in multiplied.method


def test_read_probe_counts_the_bytes_of_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ReadProbe(CPU, SMALL_BUFFER_BYTES)
    monkeypatch.setattr(ceilings, "time_calls", lambda *args, **kwargs: [1e-3, 2e-3, 4e-3])
    assert probe.sample().p50 == pytest.approx(SMALL_BUFFER_BYTES / 2e-3 / 1e9)


def test_contention_is_what_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([(0.0, 100.0, 10.0), (10.0, 125.0, 20.0), (10.0, 105.0, 20.0)])
    monkeypatch.setattr(Contention, "_now", staticmethod(lambda: next(moments)))
    contention = Contention()
    assert contention.cores() == pytest.approx(1.5)
    assert contention.cores() == 0.0  # clocks of different grain must not make it negative


def test_environment_describes_this_process() -> None:
    found = describe_environment("cpu")
    assert (found.device, found.torch, found.threads) == ("cpu", torch.__version__, torch.get_num_threads())
    assert found.cpu and found.cores >= 1 and found.command
    assert found.cuda is None and found.driver is None
    assert json.loads(json.dumps(dataclasses.asdict(found)))["python"] == found.python


def test_git_state_tells_clean_from_dirty(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    tracked = tmp_path / "file.py"
    tracked.write_text("1\n")
    assert git_state(tmp_path) == (None, None)
    git("init", "-q")
    git("add", "file.py")
    git("commit", "-q", "-m", "one")
    commit, dirty = git_state(tmp_path)
    assert commit is not None and len(commit) == 40 and dirty is False
    tracked.write_text("2\n")
    assert git_state(tmp_path) == (commit, True)
    # Installed into somebody else's repository: their commit is not ours.
    untracked = tmp_path / "site-packages"
    untracked.mkdir()
    (untracked / "ours.py").write_text("1\n")
    assert git_state(untracked) == (None, None)


def test_environment_survives_missing_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr("fastllama.benchmarks.environment.subprocess.run", missing)
    assert (describe_environment(CPU).git_commit, describe_environment(CPU).git_dirty) == (None, None)


def test_result_file_comes_back_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = result_file()
    write_result(result, path)
    assert read_result(path) == result
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION


def test_write_result_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(result_file(), path)
    before = path.read_text()
    broken = dataclasses.replace(result_file(), records=[{"tokens_per_second": float("nan")}])
    with pytest.raises(ValueError):
        write_result(broken, path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_write_result_cleans_up_when_the_replacement_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr("fastllama.benchmarks.result_file.os.replace", refuse)
    with pytest.raises(PermissionError):
        write_result(result_file(), tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "expected JSON"),
        ("[]", "got list"),
        ('{"schema_version": 99}', "got 99"),
        ('{"schema_version": 2}', "not a complete result file"),
        ('{"schema_version": 2, "environment": {}, "ceilings": {}, "records": [], "interrupted": false}', "complete"),
    ],
)
def test_read_result_rejects_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_result(path)
