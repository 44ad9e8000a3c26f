"""The file of answers: whole lines only, one run at a time, several processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllama.cli.batch_output import LINE_BEGIN, SEARCH_BYTES, OutputFile
from tests.support.batches import BATCH, completion, write_batch
from tests.support.command_line import ROOT, expect_error, run
from tests.support.timeouts import HANG_SECONDS


def record(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"batch_req_{number}", "custom_id": f"q{number}", "response": {}, "error": None, **more}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_answered_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "out"
    records = [
        record(1),
        record(2, response=None, error={"code": "invalid_value", "message": ""}),
        record(3, custom_id="q1", response=None, error={"code": "duplicate_custom_id", "message": ""}),
        record(4, custom_id=None, response=None, error={"code": "invalid_json", "message": ""}),
    ]
    with OutputFile(str(path)) as out:
        assert not out.begin().custom_ids
        for one in records:
            out.append(one)
    assert lines_of(path) == records
    with OutputFile(str(path)) as out:
        answered = out.begin()
    assert answered.custom_ids == {"q1", "q2"} and answered.numbers == {3, 4}


@pytest.mark.parametrize("length", [1, len(LINE_BEGIN) - 1, len(LINE_BEGIN) + 9, SEARCH_BYTES, 2 * SEARCH_BYTES + 7])
@pytest.mark.parametrize("n_before", [0, 2])
def test_an_incomplete_last_line_is_cut_off(tmp_path: Path, length: int, n_before: int) -> None:
    path = tmp_path / "out"
    before = [record(number) for number in range(n_before)]
    rest = (LINE_BEGIN + b"7" + b"x" * 3 * SEARCH_BYTES)[:length]
    path.write_bytes(b"".join(json.dumps(one).encode() + b"\n" for one in before) + rest)
    with OutputFile(str(path)) as out:
        assert len(out.begin().custom_ids) == n_before
        assert lines_of(path) == before
        out.append(record(9))
    assert lines_of(path) == [*before, record(9)]


def test_a_line_that_another_process_left_incomplete_is_cut_off_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with OutputFile(str(path), 1, 2) as out:
        out.append(record(1))
        with path.open("ab") as other:
            other.write(b'{"id": "batch_req_2", "custom')
        out.append(record(3))
    assert lines_of(path) == [record(1), record(3)]


APPEND = """
import sys
from fastllama.cli.batch_output import OutputFile
with OutputFile(sys.argv[1], int(sys.argv[3]), 3) as out:
    for number in range(60):
        body = {"text": sys.argv[2] * 20_000}
        out.append({"id": "batch_req_1", "custom_id": sys.argv[2] + str(number), "response": body, "error": None})
"""


def test_several_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "out"
    commands = [[sys.executable, "-c", APPEND, str(path), name, str(group)] for group, name in enumerate("abc")]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(HANG_SECONDS) for process in processes] == [0, 0, 0]
    found = [one["custom_id"] for one in lines_of(path)]
    assert sorted(found) == sorted(f"{name}{number}" for name in "abc" for number in range(60))


HOLD = """
import sys
from fastllama.cli.batch_output import OutputFile
group = int(sys.argv[2])
with OutputFile(sys.argv[1], group, 2) as out:
    if group == 0:
        out.begin()
    print("begun", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
@pytest.mark.parametrize("group", [0, 1])
def test_two_runs_do_not_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Also not while a process of a killed run is left."""
    out, pipe = str(tmp_path / "out"), subprocess.PIPE
    command = [sys.executable, "-c", HOLD, out, str(group)]
    path = write_batch(tmp_path / "in.jsonl", [completion("a")])
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as other:
        assert other.stdout is not None and other.stdout.readline() == b"begun\n"
        with monkeypatch.context() as patch:
            patch.setattr("fastllama.cli.batch_output.RELEASE_SECONDS", 0.0)
            expect_error(run("batch", path, out, *BATCH), "is being written by another run")
        other.kill()
        other.communicate(timeout=HANG_SECONDS)
    assert run("batch", path, out, *BATCH).exit_code == 0
