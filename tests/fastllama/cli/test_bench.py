"""The command `fastllama bench`: output, result files, exit codes and errors."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fastllama.benchmarks.compare_results import DEFAULT_THRESHOLD
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.result_file import ResultFile, write_result
from fastllama.benchmarks.statistics import summarize
from fastllama.cli import program
from fastllama.cli.bench import compare
from tests.support.command_line import expect_error, run


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.benchmarks.timing.CPU_BUFFER_BYTES", 2**16)
    monkeypatch.setattr("fastllama.benchmarks.ceilings.CPU_MATMUL_SIZE", 16)
    for kind in ("ReadProbe", "MatmulProbe"):
        monkeypatch.setattr(f"fastllama.benchmarks.ceilings.{kind}.sample.__defaults__", (0.0,))


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a temporary folder, where results without --output are written."""
    monkeypatch.chdir(tmp_path)


BENCH = ("--batch", "1,2", "--context", "4", "--steps", "3", "--rounds", "1", "--device", "cpu", "--peers", "none")


def test_bench_prints_only_the_table_to_stdout(checkpoint: str, small_probe: None) -> None:
    result = run("bench", "--suite", "decode", "--ckpt_dir", checkpoint, *BENCH)
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stdout and "comparing" not in result.stdout and "comparing" in result.stderr


def test_bench_writes_a_result_file_and_its_plots(checkpoint: str, small_probe: None, tmp_path: Path) -> None:
    result = run("bench", "--ckpt_dir", checkpoint, *BENCH, "--markdown")
    assert result.exit_code == 0, result.stderr
    (written,) = tmp_path.glob("fastllama-bench-*.json")
    assert f"wrote {written.name}" in result.stderr and "| tokens/s |" in result.stdout
    assert {path.name for path in written.with_suffix("").iterdir()} == {
        "throughput.png",
        "launches.png",
        "latency.png",
    }


def test_bench_without_matplotlib_writes_a_notice(
    checkpoint: str, small_probe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllama.benchmarks.plots.available", lambda: False)
    result = run("bench", "--ckpt_dir", checkpoint, *BENCH)
    assert result.exit_code == 0 and "pip install matplotlib" in result.stderr
    assert not list(tmp_path.glob("*/*.png"))


def test_bench_strict_exits_with_1_for_failures(
    checkpoint: str, small_probe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ["decode: reference disagrees: row 0 step 0: token 1 here, 2 there"]
    monkeypatch.setattr("fastllama.benchmarks.bench.failures", lambda result: wrong)
    lenient, strict = (
        run("bench", "--ckpt_dir", checkpoint, *BENCH, "--no_plots", *words) for words in ((), ("--strict",))
    )
    assert lenient.exit_code == 0 and strict.exit_code == 1
    assert wrong[0] in strict.stderr and wrong[0] not in lenient.stderr


def test_compare_prints_ratios_and_fails_on_a_regression(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.json") for name in ("first", "second")]
    for path, rate in zip(paths, (100.0, 50.0), strict=True):
        record = {"suite": "decode", "batch": 1, "tokens_per_second": asdict(summarize([rate, rate]))}
        write_result(ResultFile(describe_environment("cpu"), {}, [record]), path)
    same, worse, better = (run("bench", "compare", *two) for two in ((paths[0],) * 2, paths, paths[::-1]))
    assert (same.exit_code, worse.exit_code, better.exit_code) == (0, 1, 0)
    assert "REGRESSION" in worse.stdout and "0.50x" in worse.stdout and "better" in better.stdout
    found = json.loads(run("bench", "compare", *paths, "--json").stdout)
    assert found["changes"][0]["ratio"] == 0.5 and found["only_first"] == []
    assert "| REGRESSION |" in run("bench", "compare", *paths, "--markdown").stdout
    (tmp_path / "other.json").write_text("{}")
    expect_error(run("bench", "compare", paths[0], str(tmp_path / "other.json")), "other.json", "schema version")
    expect_error(run("bench", "compare", paths[0], "nowhere.json"), "nowhere.json")
    expect_error(run("bench", "--json", "compare", *paths), "put --json after compare")
    assert compare.params[2].default == DEFAULT_THRESHOLD


def test_bench_json_is_the_result_files_object(tmp_path: Path, checkpoint: str, small_probe: None) -> None:
    path = tmp_path / "result.json"
    result = run("bench", "--ckpt_dir", checkpoint, *BENCH, "--json", "--output", str(path))
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert json.loads(result.stdout) == json.loads(path.read_text())
    assert [record["batch"] for record in json.loads(result.stdout)["records"]] == [1, 2]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--suite", "decode,prefil"), ("--suite", "'prefil' is not one of kernels, decode")),
        (("--model", "gpt"), ("--model",)),
        (("--batch", "1,x"), ("--batch",)),
        (("--batch", "0"), ("--batch",)),
        (("--context", "1,-2"), ("--context",)),
        (("--steps", "1"), ("--steps",)),
        (("--peers", "vllm"), ("--peers", "reference")),
        (("compare", "one.json", "two.json"), ("one.json", "does not exist")),
        (("--model", "builtin", "--ckpt_dir", "x"), ("exclude each other",)),
        (("--tokenizer_path", "x"), ("needs --ckpt_dir",)),
        (("--model", "random-176m", "--device", "cuda:99"), ("cuda:99",)),
        (("--model", "random-176m", "--device", "tpu"), ("tpu",)),
        (("--ckpt_dir", "nowhere"), ("nowhere",)),
        (("--speculate", "lookup"), ("--speculate", "speculate suite")),
        (("--suite", "decode", "--draft", "x"), ("--draft", "speculate suite")),
        (("--suite", "prefill,generate", "--n_guesses", "3"), ("--n_guesses", "speculate suite")),
    ],
)
def test_bench_errors_name_the_option(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    expect_error(run("bench", *words), *parts)


def test_bench_interrupted_prints_the_results_so_far(
    checkpoint: str, small_probe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastllama.benchmarks.suites.interleaved.run_case", interrupt)
    result = run("bench", "--ckpt_dir", checkpoint, *BENCH, "--json")
    assert result.exit_code == program.EXIT_INTERRUPTED
    assert json.loads(result.stdout)["interrupted"] is True
