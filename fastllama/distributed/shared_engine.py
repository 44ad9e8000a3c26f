"""An engine of requests on a model that several processes share.

Requests come to the driver. Before each step it sends the workers what was submitted and cancelled since the last one:
prompts as token ids, with random streams and stop tokens. All processes follow these commands in the same order, and
run the same step. Nothing in a step depends on time, on free memory or on the order of a set. So all decide alike, and
only commands are exchanged. While there is nothing to do, nothing is sent, and the workers wait.
"""

import pickle
from typing import Any

import torch
import torch.distributed as dist

from fastllama.distributed.driver import Driver, control_group, wait_for_crash_report
from fastllama.distributed.interrupts import delay_interrupts
from fastllama.engine import Engine
from fastllama.engine.commands import Cancellation, Command, NewRequest, Preparation, Task
from fastllama.engine.grammar_matcher import prepare
from fastllama.engine.request import Request
from fastllama.generation import Llama

TASKS = list(Task)  # sent by number
STATE_NUMBERS = 4  # of `Engine.state`


class OutOfStep(RuntimeError):
    """This process has another state than the driver: it cannot go on."""


def open_engine(llm: Llama, *, max_tokens_per_step: int | None = None, reuse_prefixes: bool = True) -> Engine:
    """An engine on a Llama, or on a Driver's model in all processes. The arguments are those of `Engine`.

    A Driver has no other call until the engine is closed. Raises ValueError if the processes do not all share one
    model, and RuntimeError while a call, an open stream or another engine uses it.
    """
    options: dict[str, Any] = {"reuse_prefixes": reuse_prefixes}
    if max_tokens_per_step is not None:
        options["max_tokens_per_step"] = max_tokens_per_step
    if not isinstance(llm, Driver):
        return llm.engine(**options)
    size, n_processes = llm.model.group.size, dist.get_world_size()
    if size != n_processes:
        raise ValueError(
            f"an engine needs a model that all {n_processes} processes share, and this one is shared by {size}: leave "
            f"model_parallel_size out, or start {size} processes"
        )
    return SharedEngine(llm, **options)


class SharedEngine(Engine):
    """The driver's engine. Errors that end it leave the workers in an unknown state: they cannot be used again."""

    leads_processes = True

    def __init__(self, driver: Driver, **options: Any) -> None:
        """Start the workers' engines. The options are those of `Engine`."""
        super().__init__(driver.llm, **options)  # raises what is wrong with the options before the workers do
        driver.check_free()
        driver.llm.model.check_idle()
        self._driver = driver
        with delay_interrupts():
            driver.call_on_workers(follow_driver, **options)
            driver.shared_engine = self

    def _run(self, task: Task) -> None:
        with delay_interrupts():
            super()._run(task)

    def _announce(self, commands: list[Command], task: Task) -> None:
        _send(self._driver.control, commands, task, self.state)

    def accept(self, command: NewRequest) -> Request:
        """As `Engine.accept`. The workers compile a grammar while this process does."""
        if command.params.grammar is not None:
            with self._mail:
                self._check_open()
                self._put(Preparation(command.params.grammar), None)
            self._follow_at_once()
        return super().accept(command)

    def _fail(self, error: BaseException) -> None:
        self.failure = error  # at once: who is refused asks for the reason
        self._driver.out_of_step = self._closing = True
        if isinstance(error, Exception):
            wait_for_crash_report(error)
        super()._fail(error)

    def _end_all(self) -> None:
        with self._lock:
            try:
                if self._driver.shared_engine is self and not self._driver.out_of_step:
                    self._run(Task.CLOSE)
            finally:  # the workers have left the engine, also if Ctrl-C waited for that
                if self._driver.shared_engine is self:
                    self._driver.shared_engine = None
            with self._mail:
                self._inbox.clear()  # cancellations of requests that have ended
                self._release_model_if_idle()


def follow_driver(llm: Llama, **options: Any) -> None:
    """Run the same engine in a worker until the driver closes it. Nobody reads the answers here."""
    control, task = control_group(), Task.NOTHING
    with Engine(llm, **options) as engine:
        while task is not Task.CLOSE:
            commands, task, state = _receive(control)
            if state != engine.state:
                raise OutOfStep(f"this process has the state {engine.state} and the driver {state}")
            for command in commands:
                match command:
                    case Preparation(grammar):
                        prepare(grammar, llm.tokenizer, llm.model.vocab_size)
                    case Cancellation(number):
                        engine.cancel_number(number)
                    case NewRequest():
                        engine.accept(command)
            if task is Task.STEP:
                engine.step()


def _send(control: "dist.ProcessGroup", commands: list[Command], task: Task, state: list[int]) -> None:
    """Send the workers what comes next: a few numbers, and the commands if there are any."""
    data = pickle.dumps(commands) if commands else b""
    _broadcast(control, torch.tensor([len(data), TASKS.index(task), *state], dtype=torch.int64, device="cpu"))
    if data:
        _broadcast(control, torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _receive(control: "dist.ProcessGroup") -> tuple[list[Command], Task, list[int]]:
    """Wait for what comes next."""
    header = torch.zeros(2 + STATE_NUMBERS, dtype=torch.int64, device="cpu")
    _broadcast(control, header)
    n_bytes, task, *state = header.tolist()
    data = torch.zeros(n_bytes, dtype=torch.uint8, device="cpu")
    if n_bytes:
        _broadcast(control, data)
    return pickle.loads(data.numpy().tobytes()) if n_bytes else [], TASKS[task], state


def _broadcast(control: "dist.ProcessGroup", tensor: torch.Tensor) -> None:
    dist.broadcast(tensor, src=0, group=control)
