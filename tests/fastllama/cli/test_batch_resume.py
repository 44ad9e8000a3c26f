"""`fastllama batch` that is interrupted, killed, or short of space goes on with the same command; and stdin."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastllama.cli.batch_output import OutputFile
from tests.support.batches import BATCH, Record, all_choices, completion, read_records, write_batch
from tests.support.command_line import ROOT, run
from tests.support.tiers import parameters
from tests.support.timeouts import HANG_SECONDS

N_LINES = 120
WAIT_SECONDS = 0.01
COMMAND = (sys.executable, "-m", "fastllama", "batch")


def many_lines() -> Iterator[Record]:
    """Requests with seeds of their own and without, too many to be finished before the command is ended."""
    for number in range(N_LINES):
        seed = {"seed": number} if number % 2 else {}
        yield completion(str(number), f"Once {number}", max_tokens=20, temperature=0.8, ignore_eos=True, **seed)


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "no answers came"
        time.sleep(WAIT_SECONDS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    path, out = write_batch(folder / "in.jsonl", many_lines()), folder / "out.jsonl"
    assert run("batch", path, str(out), *BATCH).exit_code == 0
    return all_choices(out)


@pytest.mark.parametrize("sent", parameters({"SIGKILL": signal.SIGKILL, "SIGINT": signal.SIGINT}, ("SIGKILL",)))
def test_the_same_command_goes_on(tmp_path: Path, uninterrupted: dict[str, list[Record]], sent: signal.Signals) -> None:
    path, out = write_batch(tmp_path / "in.jsonl", many_lines()), tmp_path / "out.jsonl"
    words = (path, str(out), *BATCH)
    one_row = (*COMMAND, *words, "--max_batch_size", "1")
    with subprocess.Popen(one_row, stderr=subprocess.PIPE, text=True, cwd=ROOT) as command:
        wait_for_lines(out, 3)
        command.send_signal(sent)
        _, stderr = command.communicate(timeout=HANG_SECONDS)
    if sent == signal.SIGINT:
        assert command.returncode == 130
        last = f"interrupted: the answers so far are in {out}; the same command goes on from there"
        summary_line, last_line = stderr.strip().splitlines()[-2:]
        assert last_line == last and "requests in" in summary_line
    else:
        assert command.returncode == -signal.SIGKILL
    n_before = out.read_bytes().count(b"\n")
    assert 3 <= n_before < N_LINES
    again = run("batch", *words, "--json")
    assert again.exit_code == 0, again.output
    summary = json.loads(again.stdout)
    assert (summary["answered_before"], summary["requests"]) == (n_before, N_LINES - n_before)
    assert all_choices(out) == uninterrupted


def test_an_interruption_is_in_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = OutputFile.append

    def interrupted(self: OutputFile, record: Record) -> None:
        append(self, record)
        if record["custom_id"] == "1":
            raise KeyboardInterrupt

    monkeypatch.setattr(OutputFile, "append", interrupted)
    path, out = write_batch(tmp_path / "in.jsonl", many_lines()), tmp_path / "out.jsonl"
    result = run("batch", path, str(out), *BATCH, "--json")
    assert result.exit_code == 130
    summary = json.loads(result.stdout)
    assert summary["error"] == "interrupted" and 0 <= summary["requests"] < N_LINES


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
runpy.run_module("fastllama", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
def test_a_full_disk_ends_the_run_which_goes_on_later(tmp_path: Path) -> None:
    path, out = write_batch(tmp_path / "in.jsonl", list(many_lines())[:20]), tmp_path / "out.jsonl"
    command = [sys.executable, "-c", LIMITED, "batch", path, str(out), *BATCH, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=HANG_SECONDS)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"fastllama: error: {out} cannot be written: File too large"
    assert out.stat().st_size <= 3000
    assert run("batch", path, str(out), *BATCH).exit_code == 0
    assert len(all_choices(out)) == 20


def test_lines_may_come_through_stdin(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    lines = [json.dumps(completion(name)) for name in "abc"]
    result = run("batch", "-", str(out), *BATCH, stdin="\ufeff" + "\n".join(lines))
    assert result.exit_code == 0, result.output
    assert all_choices(out).keys() == set("abc")
    again = run("batch", "-", str(out), *BATCH, "--json", stdin="\n".join(lines))
    assert json.loads(again.stdout)["answered_before"] == 3


def test_a_pipe_that_is_open_keeps_no_answer_back(tmp_path: Path) -> None:
    out, lines = tmp_path / "out.jsonl", [json.dumps(one).encode() for one in many_lines()]
    command = (*COMMAND, "-", str(out), *BATCH, "--json")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        process.stdin.write(b"\n".join(lines[:3]) + b"\n" + lines[3][:10])
        process.stdin.flush()
        wait_for_lines(out, 3)
        process.stdin.write(lines[3][10:] + b"\n" + lines[4])  # without a line end
        stdout, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0 and json.loads(stdout)["requests"] == 5
    assert read_records(out).keys() == set("01234")


def test_a_terminal_as_stdin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.cli.standard_streams.stdin_is_terminal", lambda: True)
    result = run("batch", "-", str(tmp_path / "out"))
    assert result.exit_code == 2 and "nothing is piped in" in result.stderr
