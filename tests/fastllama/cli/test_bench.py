"""`fastllama bench`, as a command."""

import json
from pathlib import Path

import pytest

from fastllama.cli import program
from tests.command_line import expect_error, run


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.benchmarks.measure.CPU_BUFFER_BYTES", 2**16)
    monkeypatch.setattr("fastllama.benchmarks.measure.CPU_MATMUL_SIZE", 16)
    monkeypatch.setattr("fastllama.benchmarks.measure.ReadProbe.sample.__defaults__", (0.0,))


BENCH = ("--batch", "1,2", "--context", "4", "--steps", "3", "--rounds", "1", "--device", "cpu", "--peers", "none")


def test_bench_prints_a_table_and_keeps_stdout_for_it(checkpoint: str, small_probe: None) -> None:
    result = run("bench", "--suite", "decode", "--ckpt_dir", checkpoint, *BENCH)
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stdout and "comparing" not in result.stdout and "comparing" in result.stderr


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
        (("--suite", "decode,prefil"), ("--suite", "'prefil' is not one of decode")),
        (("--model", "gpt"), ("--model",)),
        (("--batch", "1,x"), ("--batch",)),
        (("--batch", "0"), ("--batch",)),
        (("--context", "1,-2"), ("--context",)),
        (("--steps", "1"), ("--steps",)),
        (("--peers", "vllm"), ("--peers", "reference")),
        (("--model", "builtin", "--ckpt_dir", "x"), ("exclude each other",)),
        (("--tokenizer_path", "x"), ("needs --ckpt_dir",)),
        (("--model", "random-176m", "--device", "cuda:99"), ("cuda:99",)),
        (("--model", "random-176m", "--device", "tpu"), ("tpu",)),
        (("--ckpt_dir", "nowhere"), ("nowhere",)),
    ],
)
def test_bench_rejects_by_name(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    expect_error(run("bench", *words), *parts)


def test_bench_interrupted_prints_what_there_is(
    checkpoint: str, small_probe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastllama.benchmarks.suite.measure", interrupt)
    result = run("bench", "--ckpt_dir", checkpoint, *BENCH, "--json")
    assert result.exit_code == program.EXIT_INTERRUPTED
    assert json.loads(result.stdout)["interrupted"] is True
