"""Writing and reading result files."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.result_file import SCHEMA_VERSION, ResultFile, one_line, read_result, write_result
from fastllama.benchmarks.statistics import summarize
from tests.benchmarks.cases import CPU


def result_file() -> ResultFile:
    ceiling = Ceiling("read", "GB/s", "a guess", summarize([1.0, 2.0, 4.0]))
    return ResultFile(describe_environment(CPU), {"read": ceiling}, [{"suite": "decode", "batch": 1}])


def test_read_result_returns_what_was_written(tmp_path: Path) -> None:
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


def test_one_line_is_one_line_and_short() -> None:
    assert one_line("one\n  two") == "one two"
    assert len(one_line("x" * 5000)) < 400
