"""`--nproc`, and commands under torchrun: the same answers, one process at the terminal, and nobody left behind."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from fastllama import workers
from fastllama.args import ModelArgs
from fastllama.limits import memory_plan
from tests.checkpoints import tiny_params
from tests.command_line import CHAT, ROOT, expect_error, run, run_process

DEADLINE_S = 10


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.parametrize("how", ["--nproc", "torchrun"])
def test_a_chat_of_two_processes_reads_and_answers_once(how: str) -> None:
    lines = "What is the capital of France?\n/reset\nHello\n"
    alone = run("chat", *CHAT, stdin=lines)
    if how == "--nproc":
        together = run_process("chat", *CHAT, "--nproc", "2", stdin=lines)
    else:
        together = run_process("chat", *CHAT, stdin=lines, launcher=TORCHRUN)
    assert together.returncode == 0, together.stderr
    assert alone.stdout == together.stdout and len(together.stdout.splitlines()) == 2


def test_a_benchmark_of_two_processes(checkpoint: str) -> None:
    sizes = ("--suite", "decode,memory", "--batch", "2", "--context", "4", "--steps", "3", "--rounds", "1")
    where = ("--ckpt_dir", checkpoint, "--device", "cpu", "--nproc", "2", "--peers", "none", "--no_plots")
    found = run_process("bench", *sizes, *where, "--json")
    assert found.returncode == 0, found.stderr
    decode, memory = json.loads(found.stdout)["records"]
    assert decode["nproc"] == 2 and decode["tokens_per_second"]["p50"] > 0
    launches = {one["launch"]: one["count"] for one in decode["launches"]}
    assert launches["sum"] == 2 * launches["qkv"] + 1 and launches["gather"] == 1
    whole = ModelArgs(**tiny_params(), max_batch_size=2, max_seq_len=7)
    part = memory_plan(whole, torch.float32, 2, 7, n_processes=2)
    assert memory["planned"]["total"] == part.total < memory_plan(whole, torch.float32, 2, 7).total
    assert memory["peak_bytes"] >= memory["held_bytes"] > 0


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
