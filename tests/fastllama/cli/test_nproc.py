"""Commands with `--nproc` and under torchrun: one process's output, and no process left running."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import psutil
import pytest
import torch

from fastllama import Llama
from fastllama.args import ModelArgs
from fastllama.benchmarks.models import ModelSource, ModelSpec
from fastllama.distributed.worker_processes import EXIT_WORKER_CRASHED
from fastllama.memory_plan import plan_memory
from tests.support.checkpoints import tiny_params
from tests.support.command_line import CHAT, GREEDY, ROOT, expect_error, run, run_process
from tests.support.tiers import parameters
from tests.support.timeouts import HANG_SECONDS
from tests.support.tiny import write_endless_checkpoint

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# A launcher without torchrun's agent. Its second process has no stdin and no output.
OWN_LAUNCHER = """
import os, socket, subprocess, sys
with socket.create_server(("127.0.0.1", 0)) as free:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
command, null = [sys.executable, *sys.argv[1:]], subprocess.DEVNULL
second = subprocess.Popen(command, env={**os.environ, **variables, "RANK": "1"}, stdin=null)
first = subprocess.run(command, env={**os.environ, **variables, "RANK": "0"})
sys.exit(first.returncode or second.wait())
"""


@pytest.mark.parametrize(
    "launched_by", parameters({name: name for name in ("--nproc", "torchrun", "own launcher")}, quick=("--nproc",))
)
def test_a_chat_of_two_processes_reads_and_answers_once(launched_by: str) -> None:
    lines = "What is the capital of France?\n/reset\nHello\n"
    alone = run("chat", *CHAT, stdin=lines)
    if launched_by == "--nproc":
        together = run_process("chat", *CHAT, "--nproc", "2", stdin=lines)
    else:
        launcher = TORCHRUN if launched_by == "torchrun" else ("-c", OWN_LAUNCHER)
        together = run_process("chat", *CHAT, stdin=lines, launcher=launcher)
    assert together.returncode == 0, together.stderr
    assert alone.stdout == together.stdout and len(together.stdout.splitlines()) == 2


@pytest.mark.slow
def test_a_benchmark_on_two_processes(checkpoint: str) -> None:
    sizes = ("--suite", "decode,memory", "--batch", "2", "--context", "4", "--steps", "3", "--rounds", "1")
    model = ("--ckpt_dir", checkpoint, "--device", "cpu", "--nproc", "2", "--peers", "none", "--no_plots")
    found = run_process("bench", *sizes, *model, "--json")
    assert found.returncode == 0, found.stderr
    decode, memory = json.loads(found.stdout)["records"]
    assert decode["nproc"] == 2 and decode["tokens_per_second"]["p50"] > 0
    launches = {one["launch"]: one["count"] for one in decode["launches"]}
    assert launches["all-reduce"] == 2 * launches["qkv"] + 1 and launches["all-gather"] == 1
    args = ModelArgs(**tiny_params(), max_batch_size=2, max_seq_len=7)
    plans = [plan_memory(args, torch.float32, 2, 7, n_processes=n) for n in (1, 2)]
    assert memory["planned"]["weights"] == plans[1].weights < plans[0].weights
    assert memory["peak_bytes"] >= memory["held_bytes"] > 0


class Endless(NamedTuple):
    """A command that generates without end, and the processes that it started."""

    command: "subprocess.Popen[str]"
    processes: list[psutil.Process]


def model_processes(command: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The processes that share the command's model, without those that libraries start."""
    children = psutil.Process(command.pid).children()
    return [child for child in children if child.is_running() and any("fastllama" in word for word in _words(child))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@pytest.fixture(scope="module")
def endless_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose greedy generation never stops."""
    return write_endless_checkpoint(tmp_path_factory.mktemp("endless_checkpoint"))


@pytest.fixture
def endless(endless_checkpoint: str, request: pytest.FixtureRequest) -> Iterator[Endless]:
    """A running command. Parameters: the number of processes, and what starts them."""
    count, launched_by = request.param
    words = ["-m", "fastllama", "complete", "Once", "--ckpt_dir", endless_checkpoint, "--device", "cpu"]
    words += ["--max_seq_len", "8000", "--temperature", "0"]
    words = [*TORCHRUN[:-1], count, *words] if launched_by == "torchrun" else [*words, "--nproc", count]
    pipe = subprocess.PIPE
    command = subprocess.Popen([sys.executable, *words], stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    try:
        assert command.stdout is not None
        assert command.stdout.read(1)  # the first piece of text
        yield Endless(command, model_processes(command))
    finally:
        command.kill()
        command.communicate()


def assert_gone(processes: list[psutil.Process]) -> None:
    psutil.wait_procs(processes, timeout=HANG_SECONDS)
    assert not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    "endless", parameters({"--nproc": ("4", "--nproc"), "torchrun": ("2", "torchrun")}, ()), indirect=True
)
def test_a_killed_process_ends_the_command_with_the_reason(endless: Endless) -> None:
    command, processes = endless
    rank = processes[-1].environ()["RANK"]  # process ids begin again at times, so the order says nothing
    processes[-1].send_signal(signal.SIGKILL)
    _, stderr = command.communicate(timeout=HANG_SECONDS)
    if len(processes) == 3:
        assert command.returncode == EXIT_WORKER_CRASHED
        assert f"process {rank} of 4 was killed by signal 9 (SIGKILL)" in stderr.splitlines()[-1]
    else:  # torchrun started both processes
        assert command.returncode != 0 and "SIGKILL" in stderr
    assert_gone(processes)


@pytest.mark.parametrize("endless", [("2", "--nproc")], ids=[""], indirect=True)
@pytest.mark.parametrize("sent", parameters({"SIGKILL": signal.SIGKILL, "SIGINT": signal.SIGINT}, ("SIGKILL",)))
def test_no_process_is_left_when_the_driver_ends(endless: Endless, sent: signal.Signals) -> None:
    endless.command.send_signal(sent)
    endless.command.communicate(timeout=HANG_SECONDS)
    if sent == signal.SIGINT:
        assert endless.command.returncode == 130
    assert len(endless.processes) == 1
    assert_gone(endless.processes)


FAILING = """
from fastllama.distributed import driver
from tests.fastllama.cli.test_nproc import build_on_the_driver_only
driver.start_workers(2)
driver.build_on_all(build_on_the_driver_only)
"""


def build_on_the_driver_only() -> Llama:
    llm = ModelSpec(ModelSource.named("random-toy"), torch.device("cpu"), torch.float32, 1, 8).build()
    if llm.model.group.rank:
        raise OSError("no space left on this worker")
    return llm


def test_an_error_of_a_worker_only_ends_the_driver() -> None:
    """The error comes after the last exchange of errors, while the driver waits in a collective for the worker."""
    found = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert found.returncode == EXIT_WORKER_CRASHED
    assert "process 1 of 2 ended with code 1: OSError: no space left on this worker" in found.stderr


def test_a_build_error_is_reported_once() -> None:
    found = run_process("complete", "x", "--ckpt_dir", "nowhere", "--nproc", "2", "--device", "cpu")
    assert found.returncode == 2 and found.stdout == ""
    assert len(found.stderr.splitlines()) == 1 and "nowhere" in found.stderr


def test_nproc_with_a_gpus_index_or_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_error(run("complete", "x", "--nproc", "2", "--device", "cuda:0"), "--nproc", "not cuda:0")
    expect_error(run("complete", "x", "--nproc", "0"), "--nproc")
    monkeypatch.setenv("WORLD_SIZE", "2")
    expect_error(run("complete", "x", "--nproc", "2"), "torchrun")


LAUNCHER = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("command", [("complete", "x"), ("chat",), ("bench",)], ids=lambda command: command[0])
@pytest.mark.parametrize("wrong", [{"WORLD_SIZE": "two"}, {"RANK": "7"}, {"MASTER_PORT": ""}], ids=str)
def test_an_invalid_variable_is_named_before_any_work(
    command: tuple[str, ...], wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (LAUNCHER | wrong).items():
        monkeypatch.setenv(name, value)
    (name,) = wrong
    expect_error(run(*command), name, "unset")
    for words in (("--help",), (*command, "--help"), ("inspect",)):
        assert run(*words).exit_code == 0


def test_ranks_above_0_print_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 prints help, output and usage errors."""
    for name, value in (LAUNCHER | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("fastllama.distributed.worker.run_worker", lambda: 7)
    for words, code in ((("--help",), 0), (("inspect",), 0), (("complete", "--nope"), 2), (("complete",), 7)):
        result = run(*words)
        assert (result.exit_code, result.stdout, result.stderr) == (code, "", "")


def test_one_process_ignores_the_other_variables(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (LAUNCHER | {"WORLD_SIZE": "1", "RANK": "7", "LOCAL_RANK": "x"}).items():
        monkeypatch.setenv(name, value)
    assert run("complete", "x", "--ckpt_dir", checkpoint, *GREEDY).exit_code == 0
