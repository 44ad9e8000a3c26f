"""A leader and its followers: what they are told, at every way a stream can end."""

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


class Stopping:
    def __init__(self) -> None:
        self.stop_tokens = {9, 7}


class Told:
    """A Llama of a few increments, and what its followers would receive_command."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *increments: Any) -> None:
        self.tokenizer = Stopping()
        self.increments, self.taken, self.closed = increments, 0, False
        self.heard: list[Any] = []
        monkeypatch.setattr(driver, "control_group", lambda: None)
        for name in ("send_command", "allow_increments"):
            monkeypatch.setattr(driver, name, lambda control, message: self.heard.append(message))

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


def led(told: Any) -> Generator[Any]:
    return Driver(told).stream(PROMPTS, 4, seed=3)


def test_followers_hear_the_call_and_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A allow_increments is a step of two rows; the end comes by itself, to all."""
    told = Told(monkeypatch, "a", "b", "c")
    assert list(led(told)) == ["a", "b", "c"]
    assert told.heard == [CALL, 2, 2] and told.closed


def test_a_stream_that_is_never_begun_is_never_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "a")
    led(told).close()
    assert told.heard == [] and told.taken == 0


@pytest.mark.parametrize(("taken", "run_out"), [(1, 2), (2, 2), (3, 4)])
def test_a_closed_stream_ends_at_the_end_of_what_was_granted(
    taken: int, run_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(monkeypatch, *"abcdef")
    stream = led(told)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert told.heard == [CALL, *[2] * (run_out // 2), 0] and told.taken == run_out and told.closed


def test_a_closed_stream_that_ends_by_itself_needs_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "a", "b", "c")
    stream = led(told)
    assert [next(stream) for _ in range(3)] == ["a", "b", "c"]
    stream.close()
    assert told.heard == [CALL, 2, 2] and told.closed


def test_an_interrupt_waits_for_the_end_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "a", "Ctrl-C", "b")
    stream = led(told)
    assert next(stream) == "a"
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert told.heard == [CALL, 2, 0] and told.closed


def test_an_error_ends_a_stream_for_all_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "a", ValueError("not numbers"))
    stream = led(told)
    next(stream)
    with pytest.raises(ValueError, match="not numbers"):
        next(stream)
    assert told.heard == [CALL, 2]


def doubled(llm: Any, number: int) -> int:
    return 2 * number


def test_a_function_is_called_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Any = Told(monkeypatch)
    leader: Any = Driver(told)
    assert run_on_all(leader, doubled, number=4) == 8 == run_on_all(told, doubled, number=4)
    assert told.heard == [{"function": f"{__name__}:doubled", "arguments": {"number": 4}}]


def test_what_would_run_in_one_process_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Any = Told(monkeypatch)
    led: Any = Driver(told)
    assert led.tokenizer is told.tokenizer
    with pytest.raises(AttributeError, match="'generate' would run in this process alone"):
        led.generate(PROMPTS, 4)


def test_an_interrupt_as_a_call_is_told_closes_it_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "a")

    def send_command(control: None, message: Any) -> None:
        told.heard.append(message)
        os.kill(os.getpid(), signal.SIGINT)

    stream = led(told)
    monkeypatch.setattr(driver, "send_command", send_command)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert told.heard == [CALL, 0] and told.taken == 0


def interrupting(llm: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    llm.heard.append("done")


def test_an_interrupt_waits_for_the_end_of_what_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Any = Told(monkeypatch)
    led = Driver(told)
    with pytest.raises(KeyboardInterrupt):
        led.run_on_all(interrupting)
    assert told.heard[-1] == "done" and not led.out_of_step


class Started:
    """Followers that this process started, and how long they were given to end."""

    def __init__(self) -> None:
        self.given: float | None = None

    def expect_exit(self) -> None:
        assert self.given is None

    def end(self, seconds: float) -> None:
        self.given = seconds


def failing(llm: Any) -> None:
    raise OSError("here alone")


@pytest.mark.parametrize("how", ["well", "out_of_step", "dead", "building"])
def test_followers_are_told_to_end_where_they_hear_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: Any = Told(monkeypatch)
    led, started = Driver(told), Started()
    monkeypatch.setattr(driver, "_driver", None if how == "building" else led)
    monkeypatch.setattr(driver, "_build_sent", True)
    monkeypatch.setattr(driver, "_workers", started)
    if how == "out_of_step":
        with pytest.raises(OSError, match="here alone"):
            led.run_on_all(failing)
    if how == "dead":

        def send_command(control: None, message: Any) -> None:
            raise RuntimeError("Connection closed by peer")

        monkeypatch.setattr(driver, "send_command", send_command)
    driver.shut_down()
    assert started.given == (driver.SHUTDOWN_SECONDS if how == "well" else 0)
    assert (told.heard[-1:] == [None]) is (how == "well")


def test_followers_are_started_once_and_lead_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_driver", object())
    with pytest.raises(RuntimeError, match="dismiss them first"):
        driver.build_on_all(lambda: None)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(environment, "torchrun_started", lambda: True)
    with pytest.raises(RuntimeError, match="starts no others"):
        driver.start_workers(2)


class Repeating:
    """A Llama that says what a follower asks of it."""

    def __init__(self) -> None:
        self.tokenizer = Stopping()
        self.calls: list[Any] = []

    def stream(self, *arguments: Any, **keywords: Any) -> Generator[Any]:
        self.calls.append((arguments, keywords, set(self.tokenizer.stop_tokens)))
        for number in range(3):
            self.calls.append(number)
            yield number
        raise NotFiniteError("not numbers")


REPEATING = Repeating()


def build_repeating(name: str) -> Repeating:
    assert name == "it"
    return REPEATING


def test_a_follower_repeats_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    order = {"build": f"{__name__}:build_repeating", "arguments": {"name": "it"}}
    says = iter([CALL, {"function": f"{__name__}:note", "arguments": {"text": "together"}}, CALL, CALL, None])
    grants = iter([2, 0, 3, 1, 9])
    monkeypatch.setattr(worker, "receive_build_command", lambda: json.loads(json.dumps(order)))
    monkeypatch.setattr(worker, "control_group", lambda: None)
    monkeypatch.setattr(worker, "receive_command", lambda control: next(says))
    monkeypatch.setattr(worker, "allowed_increments", lambda control: next(grants))
    monkeypatch.setattr(os, "_exit", lambda code: REPEATING.calls.append(f"exit {code}"))
    worker.run_worker()
    call = ((PROMPTS, 4), {"seed": 3}, {7, 9})
    assert REPEATING.calls == [call, 0, 1, "together", call, 0, 1, 2, call, 0, 1, 2, "exit 0"]


def note(llm: Any, text: str) -> None:
    llm.calls.append(text)


def test_without_an_order_a_follower_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "receive_build_command", lambda: None)
    worker.run_worker()


def test_a_process_of_ones_own_hears_nothing_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**told, "TORCHELASTIC_RUN_ID": "x", "OTHER": "kept"}.items():
        monkeypatch.setenv(name, value)
    assert environment.torchrun_started()
    alone = environment.single_process_environ()
    assert alone["OTHER"] == "kept" and not any(name in alone for name in (*told, "TORCHELASTIC_RUN_ID"))
    monkeypatch.delenv("MASTER_PORT")
    assert not environment.torchrun_started()
