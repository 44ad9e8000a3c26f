"""`--nproc`: the same answers, one process at the terminal, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from fastllama.cli import workers
from fastllama.cli.workers import Leader
from tests.command_line import CHAT, ROOT, expect_error, run, run_process

DEADLINE_S = 10


def test_a_chat_of_two_processes_reads_and_answers_once() -> None:
    lines = "What is the capital of France?\n/reset\nHello\n"
    alone, together = run("chat", *CHAT, stdin=lines), run_process("chat", *CHAT, "--nproc", "2", stdin=lines)
    assert together.returncode == 0, together.stderr
    assert alone.stdout == together.stdout and len(together.stdout.splitlines()) == 2


@pytest.fixture
def endless() -> Iterator[tuple["subprocess.Popen[str]", psutil.Process]]:
    """A command that generates on two processes, once it does, and the second of them."""
    words = ("complete", "Once", "--nproc", "2", "--device", "cpu", "--max_seq_len", "8000", "--temperature", "5")
    command = [sys.executable, "-m", "fastllama", *words]
    leader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert leader.stdout is not None
        assert leader.stdout.read(1)  # the first piece of text
        (follower,) = psutil.Process(leader.pid).children()
        yield leader, follower
    finally:
        leader.kill()
        leader.communicate()


def test_a_killed_worker_ends_the_command_with_the_reason(endless: Any) -> None:
    leader, follower = endless
    follower.send_signal(signal.SIGKILL)
    start = time.monotonic()
    _, said = leader.communicate(timeout=DEADLINE_S)
    assert time.monotonic() - start < DEADLINE_S and leader.returncode == workers.EXIT_WORKER_DIED
    assert "process 1 of 2 was killed by signal 9 (SIGKILL)" in said.splitlines()[-1]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_nothing_is_left_when_the_first_process_ends(endless: Any, how: signal.Signals) -> None:
    leader, follower = endless
    leader.send_signal(how)
    leader.communicate(timeout=DEADLINE_S)
    if how == signal.SIGINT:
        assert leader.returncode == 130
    psutil.wait_procs([follower], timeout=DEADLINE_S)
    assert not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE


def test_an_error_in_building_is_said_once() -> None:
    found = run_process("complete", "x", "--ckpt_dir", "nowhere", "--nproc", "2", "--device", "cpu")
    assert found.returncode == 2 and found.stdout == ""
    assert len(found.stderr.splitlines()) == 1 and "nowhere" in found.stderr


def test_nproc_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_error(run("complete", "x", "--nproc", "2", "--device", "cuda:0"), "--nproc", "not cuda:0")
    expect_error(run("complete", "x", "--nproc", "0"), "--nproc")
    monkeypatch.setenv("WORLD_SIZE", "2")
    expect_error(run("complete", "x", "--nproc", "2"), "torchrun")


class Told:
    """A Llama of a few increments, and what its followers would hear."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *increments: Any) -> None:
        self.increments, self.closed = increments, False
        self.heard: list[Any] = []
        monkeypatch.setattr(workers, "control_group", lambda: None)
        for name in ("tell", "say_whether"):
            monkeypatch.setattr(workers, name, lambda control, message: self.heard.append(message))

    def stream(self, *arguments: Any, **keywords: Any) -> Iterator[Any]:
        try:
            for increment in self.increments:
                if isinstance(increment, Exception):
                    raise increment
                if increment == "Ctrl-C":
                    os.kill(os.getpid(), signal.SIGINT)
                yield increment
        finally:
            self.closed = True


def led(told: Told) -> Any:
    leader: Any = Leader(told)  # type: ignore[arg-type]
    return leader.stream([1], seed=3)


CALL = {"arguments": ([1],), "keywords": {"seed": 3}}


def test_followers_hear_the_call_and_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "a", "b")
    assert list(led(told)) == ["a", "b"]
    assert told.heard == [CALL, True, True, True] and told.closed


def test_followers_hear_that_a_stream_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "a", "b")
    stream = led(told)
    assert next(stream) == "a"
    stream.close()
    assert told.heard == [CALL, True, False] and told.closed


def test_an_interrupt_waits_for_the_end_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "a", "Ctrl-C", "b")
    stream = led(told)
    assert next(stream) == "a"
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert told.heard == [CALL, True, True, False] and told.closed


def test_an_error_ends_a_stream_for_all_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "a", ValueError("not numbers"))
    stream = led(told)
    next(stream)
    with pytest.raises(ValueError, match="not numbers"):
        next(stream)
    assert told.heard == [CALL, True, True]
