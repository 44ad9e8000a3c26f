"""The driver and its workers: the commands that are sent for every way in which a stream can end."""

import json
import os
import signal
from collections.abc import Generator
from typing import Any

import pytest

from fastllama.distributed import driver, environment, worker
from fastllama.distributed.driver import Driver, run_on_all
from fastllama.stream import NotFiniteError

PROMPTS = [[1], [2, 3]]
CALL = {"arguments": (PROMPTS, 4), "keywords": {"seed": 3}, "stop_tokens": [7, 9]}


class StopTokens:
    def __init__(self) -> None:
        self.stop_tokens = {9, 7}


class FakeLlama:
    """A Llama that yields given increments, and records the commands sent to its workers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *increments: Any) -> None:
        self.tokenizer = StopTokens()
        self.increments, self.taken, self.closed = increments, 0, False
        self.sent: list[Any] = []
        monkeypatch.setattr(driver, "control_group", lambda: None)
        for name in ("send_command", "send_increment_count"):
            monkeypatch.setattr(driver, name, lambda control, message: self.sent.append(message))

    def stream(self, *arguments: Any, **keywords: Any) -> Generator[Any]:
        try:
            for increment in self.increments:
                if isinstance(increment, Exception):
                    raise increment
                if increment == "Ctrl-C":
                    os.kill(os.getpid(), signal.SIGINT)
                self.taken += 1
                yield increment
        finally:
            self.closed = True


def driven_stream(llm: Any) -> Generator[Any]:
    return Driver(llm).stream(PROMPTS, 4, seed=3)


def test_workers_receive_the_call_and_a_count_for_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of two rows has two increments; a stream that ends by itself needs no command."""
    llm = FakeLlama(monkeypatch, "a", "b", "c")
    assert list(driven_stream(llm)) == ["a", "b", "c"]
    assert llm.sent == [CALL, 2, 2] and llm.closed


def test_a_stream_that_never_starts_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLlama(monkeypatch, "a")
    driven_stream(llm).close()
    assert llm.sent == [] and llm.taken == 0


@pytest.mark.parametrize(("taken", "run"), [(1, 2), (2, 2), (3, 4)])
def test_a_closed_stream_first_runs_the_increments_that_were_allowed(
    taken: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = FakeLlama(monkeypatch, *"abcdef")
    stream = driven_stream(llm)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert llm.sent == [CALL, *[2] * (run // 2), 0] and llm.taken == run and llm.closed


def test_a_closed_stream_that_ends_by_itself_sends_no_close(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLlama(monkeypatch, "a", "b", "c")
    stream = driven_stream(llm)
    assert [next(stream) for _ in range(3)] == ["a", "b", "c"]
    stream.close()
    assert llm.sent == [CALL, 2, 2] and llm.closed


def test_an_interrupt_waits_for_the_end_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLlama(monkeypatch, "a", "Ctrl-C", "b")
    stream = driven_stream(llm)
    assert next(stream) == "a"
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert llm.sent == [CALL, 2, 0] and llm.closed


def test_an_error_ends_a_stream_and_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLlama(monkeypatch, "a", ValueError("not numbers"))
    stream = driven_stream(llm)
    next(stream)
    with pytest.raises(ValueError, match="not numbers"):
        next(stream)
    assert llm.sent == [CALL, 2]


def doubled(llm: Any, number: int) -> int:
    return 2 * number


def test_a_function_is_called_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = FakeLlama(monkeypatch)
    on_all: Any = Driver(llm)
    assert run_on_all(on_all, doubled, number=4) == 8 == run_on_all(llm, doubled, number=4)
    assert llm.sent == [{"function": f"{__name__}:doubled", "arguments": {"number": 4}}]


def test_a_call_of_the_drivers_process_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = FakeLlama(monkeypatch)
    on_all: Any = Driver(llm)
    assert on_all.tokenizer is llm.tokenizer
    with pytest.raises(AttributeError, match="'generate' would run in this process only"):
        on_all.generate(PROMPTS, 4)


def test_an_interrupt_while_a_call_is_sent_closes_it_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLlama(monkeypatch, "a")

    def send_command(control: None, message: Any) -> None:
        llm.sent.append(message)
        os.kill(os.getpid(), signal.SIGINT)

    stream = driven_stream(llm)
    monkeypatch.setattr(driver, "send_command", send_command)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert llm.sent == [CALL, 0] and llm.taken == 0


def interrupting(llm: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    llm.sent.append("done")


def test_an_interrupt_waits_for_the_end_of_a_function_on_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = FakeLlama(monkeypatch)
    on_all = Driver(llm)
    with pytest.raises(KeyboardInterrupt):
        on_all.run_on_all(interrupting)
    assert llm.sent[-1] == "done" and not on_all.out_of_step


class FakeWorkerProcesses:
    """Workers that this process started, and the seconds that they had to exit."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def expect_exit(self) -> None:
        assert self.seconds is None

    def stop(self, seconds: float) -> None:
        self.seconds = seconds


def failing(llm: Any) -> None:
    raise OSError("in this process only")


@pytest.mark.parametrize("state", ["in_step", "out_of_step", "crashed", "building"])
def test_only_workers_in_step_receive_the_shutdown_command(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = FakeLlama(monkeypatch)
    on_all, workers = Driver(llm), FakeWorkerProcesses()
    monkeypatch.setattr(driver, "_driver", None if state == "building" else on_all)
    monkeypatch.setattr(driver, "_build_sent", True)
    monkeypatch.setattr(driver, "_workers", workers)
    if state == "out_of_step":
        with pytest.raises(OSError, match="in this process only"):
            on_all.run_on_all(failing)
    if state == "crashed":

        def send_command(control: None, message: Any) -> None:
            raise RuntimeError("Connection closed by peer")

        monkeypatch.setattr(driver, "send_command", send_command)
    driver.shut_down()
    assert workers.seconds == (driver.SHUTDOWN_SECONDS if state == "in_step" else 0)
    assert (llm.sent[-1:] == [None]) is (state == "in_step")


def test_workers_start_once_and_have_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_driver", object())
    with pytest.raises(RuntimeError, match="shut_down"):
        driver.build_on_all(lambda: None)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(environment, "is_distributed", lambda: True)
    with pytest.raises(RuntimeError, match="cannot start workers"):
        driver.start_workers(2)


class RecordingLlama:
    """A Llama that records its calls."""

    def __init__(self) -> None:
        self.tokenizer = StopTokens()
        self.calls: list[Any] = []

    def stream(self, *arguments: Any, **keywords: Any) -> Generator[Any]:
        self.calls.append((arguments, keywords, set(self.tokenizer.stop_tokens)))
        for number in range(3):
            self.calls.append(number)
            yield number
        raise NotFiniteError("not numbers")


RECORDING = RecordingLlama()


def build_recording(name: str) -> RecordingLlama:
    assert name == "it"
    return RECORDING


def test_a_worker_runs_the_drivers_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    build_command = {"build": f"{__name__}:build_recording", "arguments": {"name": "it"}}
    commands = iter([CALL, {"function": f"{__name__}:note", "arguments": {"text": "together"}}, CALL, CALL, None])
    counts = iter([2, 0, 3, 1, 9])
    monkeypatch.setattr(worker, "receive_build_command", lambda: json.loads(json.dumps(build_command)))
    monkeypatch.setattr(worker, "control_group", lambda: None)
    monkeypatch.setattr(worker, "receive_command", lambda control: next(commands))
    monkeypatch.setattr(worker, "receive_increment_count", lambda control: next(counts))
    monkeypatch.setattr(os, "_exit", lambda code: RECORDING.calls.append(f"exit {code}"))
    worker.run_worker()
    call = ((PROMPTS, 4), {"seed": 3}, {7, 9})
    assert RECORDING.calls == [call, 0, 1, "together", call, 0, 1, 2, call, 0, 1, 2, "exit 0"]


def note(llm: Any, text: str) -> None:
    llm.calls.append(text)


def test_a_worker_ends_without_a_build_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "receive_build_command", lambda: None)
    worker.run_worker()


def test_single_process_environ_has_no_launchers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**launcher, "TORCHELASTIC_RUN_ID": "x", "OTHER": "kept"}.items():
        monkeypatch.setenv(name, value)
    assert environment.is_distributed()
    alone = environment.single_process_environ()
    assert alone["OTHER"] == "kept" and not any(name in alone for name in (*launcher, "TORCHELASTIC_RUN_ID"))
    monkeypatch.delenv("MASTER_PORT")
    assert not environment.is_distributed()
