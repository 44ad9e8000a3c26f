"""An engine over two processes: one process's answers, whatever comes when, and every way in which it ends."""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from fastllama import Llama, SamplingParams
from fastllama.distributed import driver, shared_engine
from fastllama.distributed.driver import Driver
from fastllama.distributed.shared_engine import OutOfStep, follow_driver, open_engine
from fastllama.distributed.worker_processes import EXIT_WORKER_CRASHED
from fastllama.engine import Engine, Grammar
from tests.support import shared_engine_cases
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.comparisons import assert_same_logprobs
from tests.support.parallel_cases import PROMPTS, build
from tests.support.processes import ROOT
from tests.support.shared_engine_cases import LONG, params_of, value_of
from tests.support.tiers import parameters
from tests.support.timeouts import HANG_SECONDS

MODULE = ("-m", "tests.support.shared_engine_cases")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
BUILDS = parameters(
    {
        "plain": {},
        "lookup": {"speculate": "lookup"},
        "draft": {"draft": "itself"},
        "reference": {"backend": "reference"},
    },
    quick=("plain",),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shared")
    write_meta(path, tiny_params(), random_weights(tiny_params(), seed=7))
    write_tokenizer(path)
    return str(path)


def with_draft(options: dict[str, Any], folder: str) -> dict[str, Any]:
    return {name: folder if value == "itself" else value for name, value in options.items()}


def run_case(case: str, folder: str, *, launcher: tuple[str, ...] = (), **options: Any) -> Any:
    """What a case prints in the driver's process."""
    command = [sys.executable, *launcher, *MODULE, case, folder, json.dumps(options)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=HANG_SECONDS)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results_of(folder: str) -> Any:
    """The results of all cases on two processes, by the build."""
    return functools.cache(lambda options: run_case("all_cases", folder, **json.loads(options)))


def results(results_of: Any, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = results_of(json.dumps(with_draft(options, folder)))
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Assert equal tokens, texts and reasons, and log-probabilities within the tolerance."""
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours[0], theirs[0], strict=True):
            assert one[:3] == other[:3]
            assert (one[3] is None) == (other[3] is None)
            assert_same_logprobs(one[3] or [], other[3] or [], "divided logprobs")
        assert_same_logprobs(ours[1], theirs[1], "divided logprobs")


@pytest.mark.parametrize("options", BUILDS)
def test_answers_are_those_of_one_process(results_of: Any, folder: str, options: dict[str, Any]) -> None:
    found = results(results_of, folder, options)
    llm = build(folder, **with_draft(options, folder))
    with llm.engine(max_tokens_per_step=5) as engine:
        assert_same(found["answers"], shared_engine_cases.answers(llm, engine))
        alone = {name: engine.submit(PROMPTS[name], params_of(0)).result().answer.tokens for name in range(3)}
        assert found["async"] == [alone[number % 3] for number in range(6)]
        assert_same(found["direct"], [value_of(engine.submit(prompt, params_of(0))) for prompt in PROMPTS])
    assert found["answers"][-1][0][0][:3] == [[], "", "stop"], "the tokenizer's stop tokens are the driver's"
    assert found["stream"] == [list(one.tokens) for one in llm.stream(PROMPTS, 4, 0.0)]


@pytest.mark.parametrize("options", BUILDS)
def test_requests_may_be_cancelled_and_left_open(results_of: Any, folder: str, options: dict[str, Any]) -> None:
    found = results(results_of, folder, options)
    llm = build(folder)
    whole = [llm.engine().submit(prompt, LONG).result().answer.tokens for prompt in PROMPTS]
    for name, number in (("cancelled", 10), ("direct left", 9)):
        assert len(found[name]) == number
        for at, (reason, tokens) in enumerate(found[name]):
            alone = whole[1 if at == 9 else at % 3]
            assert reason in ("cancelled", "length") and tokens == alone[: len(tokens)]
            assert reason == "cancelled" or tokens == alone
    direct = [reason for reason, _ in found["direct left"]]
    assert direct == ["cancelled"] * 9 and found["direct left"][-1][1] == []
    assert [reason for reason, _ in found["cancelled"]][1:8] == ["length"] * 7
    assert set(found["left"]) <= {"cancelled", "length"} and len(found["left"]) == 9
    running, waiting, used, _, finished, *_ = found["stats"]
    assert (running, waiting, used, finished) == (0, 0, 0, 19 + 10 + 6 + 9)


def test_other_calls_are_refused_while_an_engine_is_open(results_of: Any, folder: str) -> None:
    found = results(results_of, folder, {})
    message = "RuntimeError: the processes run an engine: submit requests to it, or close it first"
    assert found["refused"] == dict.fromkeys(("stream", "run_on_all", "open_engine"), message)
    assert found["streaming"].startswith("RuntimeError: this model is busy with another call or an open stream")
    assert found["closed"] == "RuntimeError: the engine is closed: make another"
    assert found["options"] == "ValueError: max_tokens_per_step must be a whole number from 1 to 2048, got 0"


@pytest.mark.slow
def test_torchruns_processes_do_the_same(results_of: Any, folder: str) -> None:
    found = run_case("all_cases", folder, launcher=TORCHRUN)
    assert_same(found["answers"], results(results_of, folder, {})["answers"])


def test_an_error_in_the_driver_only_ends_its_engine(folder: str) -> None:
    error = "OSError: in this process only"
    found = run_case("fail_in_the_driver", folder)
    assert found[:3] == [error, error, "OSError('in this process only')"]
    assert found[3] == "RuntimeError: the engine has failed (OSError('in this process only')): make another"


@pytest.fixture
def serving(folder: str, request: pytest.FixtureRequest) -> Iterator[tuple["subprocess.Popen[str]", psutil.Process]]:
    """A driver in an event loop, and its worker. Parameter: the case."""
    pipe = subprocess.PIPE
    command = [sys.executable, *MODULE, request.param, folder]
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children = psutil.Process(process.pid).children()
        (worker,) = [one for one in children if "fastllama.distributed.worker" in one.cmdline()]
        yield process, worker
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("serving", parameters({"busy": "serve_busy", "idle": "serve_idle"}, ("busy",)), indirect=True)
def test_a_killed_worker_ends_the_driver_with_the_reason(serving: Any) -> None:
    process, worker = serving
    worker.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == EXIT_WORKER_CRASHED
    assert "fastllama: error: process 1 of 2 was killed by signal 9 (SIGKILL)" in stderr.splitlines()


@pytest.mark.parametrize("sent", parameters({"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}, ("SIGINT",)))
@pytest.mark.parametrize("serving", parameters({"busy": "serve_busy", "idle": "serve_idle"}, ("busy",)), indirect=True)
def test_no_process_is_left_after_a_signal(serving: Any, sent: signal.Signals) -> None:
    process, worker = serving
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGTERM)
    assert "error" not in stderr.lower()
    psutil.wait_procs([worker], timeout=HANG_SECONDS)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


# In one process: the messages of a driver are recorded, and followed by another engine.


class Messages:
    """Stands for the control group. What the driver sends is read later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[torch.Tensor] = []
        self.reads = False
        monkeypatch.setattr(driver, "control_group", lambda: None)
        monkeypatch.setattr(shared_engine, "control_group", lambda: None)
        monkeypatch.setattr(driver, "send_command", lambda control, command: None)
        monkeypatch.setattr(dist, "get_world_size", lambda: 1)
        monkeypatch.setattr(shared_engine, "_broadcast", self.broadcast)

    def broadcast(self, control: None, tensor: torch.Tensor) -> None:
        if self.reads:
            tensor.copy_(self.sent.pop(0))
        else:
            self.sent.append(tensor.clone())


def driven(llm: Llama) -> Engine:
    on_all: Any = Driver(llm)
    return open_engine(on_all)


def test_a_worker_follows_the_drivers_messages(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = Messages(monkeypatch)
    engine = driven(build(folder))
    requests = [engine.submit(prompt, LONG) for prompt in PROMPTS]
    n_submitted = len(messages.sent)
    engine.step()
    assert len(messages.sent) == n_submitted + 1, "one message for a step without commands"
    requests[1].cancel()
    engine.run()
    n_sent = len(messages.sent)
    assert not engine.step() and len(messages.sent) == n_sent, "nothing is sent while there is nothing to do"
    last = engine.submit(PROMPTS[0], SamplingParams(max_gen_len=4, n=2))
    engine.close()
    assert {answer.finish_reason for answer in last.result().answers} == {"cancelled"}

    messages.reads = True
    ended: list[Any] = []
    close = Engine.close

    def noted(follower: Engine) -> None:
        close(follower)
        ended.append((follower.state, follower.stats))

    monkeypatch.setattr(Engine, "close", noted)
    follow_driver(build(folder))
    assert messages.sent == [] and ended == [(engine.state, engine.stats)]


def test_a_worker_compiles_a_grammar_before_its_request_comes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages, grammar = Messages(monkeypatch), Grammar.lark("start: /[a-f]+/")
    engine = driven(build(folder))
    engine.submit(PROMPTS[0], SamplingParams(max_gen_len=4, grammar=grammar)).result()
    engine.close()
    messages.reads = True
    follower, prepared = build(folder), []

    def noted(*arguments: Any) -> None:
        prepared.append(arguments)
        assert not follower.model._lock.locked(), "no request has come"

    monkeypatch.setattr(shared_engine, "prepare", noted)
    follow_driver(follower)
    assert prepared == [(grammar, follower.tokenizer, follower.model.vocab_size)] and messages.sent == []


def test_a_worker_that_is_out_of_step_ends(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = Messages(monkeypatch)
    engine = driven(build(folder))
    engine.submit(PROMPTS[0], LONG)
    engine.step()
    engine.close()
    messages.sent[-1] = messages.sent[-1] + 0
    messages.sent[-1][-1] += 1
    messages.reads = True
    with pytest.raises(OutOfStep, match=r"this process has the state \[0, 1, 0, \d\] and the driver \[0, 1, 0, \d\]"):
        follow_driver(build(folder))


def test_groups_smaller_than_the_world_are_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Messages(monkeypatch)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="that all 4 processes share, and this one is shared by 1: leave model"):
        driven(build(folder))


def test_a_model_in_one_process_has_a_plain_engine(folder: str) -> None:
    engine = open_engine(build(folder), max_tokens_per_step=7, reuse_prefixes=False)
    assert type(engine) is Engine and engine._core._step_tokens == 7 and not engine._core.scheduler.reuses_prefixes


def test_a_thread_needs_one_process_or_a_driver(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build(folder)
    monkeypatch.setattr(llm.model, "group", type(llm.model.group)(0, 2))
    with pytest.raises(RuntimeError, match="several processes share this model, and with a thread"):
        llm.engine().start()
