"""The driver: one process runs the program, and the other processes, the workers, repeat its calls to the model.

A program that reads a terminal cannot run in every process. So only the driver runs it. The workers (`worker.py`) build
the same model and receive a command for every call. While a stream runs, the driver allows the workers a number of
increments at a time, about one step. So a stream that is closed or interrupted ends at the same increment in all
processes.

The driver starts the workers itself (`start_workers`, in `worker_processes.py`), or torchrun starts all processes.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from fastllama.distributed import environment, model_parallel
from fastllama.distributed.interrupts import delay_interrupts
from fastllama.distributed.rendezvous import connect_store
from fastllama.distributed.worker_processes import POLL_SECONDS, WorkerProcesses
from fastllama.engine import Engine
from fastllama.generation import Llama
from fastllama.stream import Increment, NotFiniteError

COMMAND_TIMEOUT = timedelta(days=365)  # for a worker that waits for a command: users may pause for long
SHUTDOWN_SECONDS = 10  # for workers to exit after the shutdown command
READABLE_ATTRIBUTES = (
    "model",
    "tokenizer",
    "formatter",
    "speculation",
)  # of a Llama: reading them needs no other process
# Keys in the store.
BUILD_KEY = "what to build"
READY_KEY = "ready "  # followed by the rank of a worker that waits for the build command

_driver: "Driver | None" = None
_workers_connected = False  # whether a launcher's workers have connected to this process
_build_sent = False  # whether the workers have received the build command
_workers: WorkerProcesses | None = None


class Driver:
    """A Llama whose streams run in all processes. READABLE_ATTRIBUTES may be read."""

    def __init__(self, llm: Llama) -> None:
        self.llm = llm
        self.control = control_group()
        self.out_of_step = False  # after an error in this process only: the workers' state is unknown
        self.engine: Engine | None = None  # that runs in all processes (`shared_engine.py`)

    def __getattr__(self, name: str) -> Any:
        if name not in READABLE_ATTRIBUTES:
            raise AttributeError(f"{name!r} would run in this process only: use `stream` or `run_on_all`")
        return getattr(self.llm, name)

    def stream(self, prompt_tokens: Sequence[Sequence[int]], *arguments: Any, **keywords: Any) -> Generator[Increment]:
        """`Llama.stream`, in all processes. Invalid arguments raise with the first increment."""
        inner: Generator[Increment] | None = None
        self._check_free()
        left, sent, ended = 0, False, False
        call = {"arguments": (prompt_tokens, *arguments), "keywords": keywords}
        try:
            # An interrupt between these calls, or between two collectives of a step, would leave the processes out of
            # step.
            with delay_interrupts():
                inner = self.llm.stream(prompt_tokens, *arguments, **keywords)
                send_command(self.control, call | {"stop_tokens": sorted(self.llm.tokenizer.stop_tokens)})
                sent = True
            while True:
                with delay_interrupts():
                    if not left:
                        left = len(prompt_tokens)
                        send_increment_count(self.control, left)
                    left -= 1
                    try:
                        increment = next(inner)
                    except StopIteration:
                        ended = True
                        return
                yield increment
        except Exception as error:
            ended = True  # in the workers, too: by the same error, or by the shutdown
            self.out_of_step |= sent and not isinstance(error, NotFiniteError)
            wait_for_crash_report(error)
            raise
        finally:
            if inner is not None and sent and not ended:
                with delay_interrupts():
                    self._drain(inner, left)

    def _drain(self, inner: Generator[Increment], left: int) -> None:
        """Close a stream early, after the `left` increments that the workers may still take."""
        if all(next(inner, None) is not None for _ in range(left)):
            send_increment_count(self.control, 0)
        inner.close()

    def run_on_all(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Call `function(llm, **arguments)` in all processes -> this process's result. Ctrl-C takes effect after it."""
        with delay_interrupts():
            try:
                self.call_on_workers(function, **arguments)
                return function(self.llm, **arguments)
            except Exception as error:
                self.out_of_step = True
                wait_for_crash_report(error)
                raise

    def call_on_workers(self, function: Callable[..., Any], **arguments: Any) -> None:
        """Let the workers call `function(llm, **arguments)`. This process does its own part of it."""
        self._check_free()
        send_command(self.control, {"function": _qualified_name(function), "arguments": arguments})

    def _check_free(self) -> None:
        if self.engine is not None:
            raise RuntimeError("the processes run an engine: submit requests to it, or close it first")

    def shut_down(self) -> None:
        """Send the workers the shutdown command. No stream may be open. An engine is closed."""
        if self.engine is not None:
            self.engine.close()
        if self.out_of_step:
            raise RuntimeError("the workers' state is unknown: they cannot receive a command")
        send_command(self.control, None)


def run_on_all(llm: Llama, function: Callable[..., Any], **arguments: Any) -> Any:
    """Call `function(llm, **arguments)`, in all processes if `llm` is a Driver -> this process's result."""
    return llm.run_on_all(function, **arguments) if isinstance(llm, Driver) else function(llm, **arguments)


def gather(name: str, value: Any) -> list[Any] | None:
    """The values of all processes, by rank, in the driver; None in the others. JSON values, once for each name.

    Ctrl-C ends the wait for them.
    """
    launch = environment.distributed_environment()
    if launch is None:
        return [value]
    _store().set(f"{name} {launch.rank}", json.dumps(value))
    if launch.rank > 0:
        return None
    keys = [f"{name} {rank}" for rank in range(launch.world_size)]
    while not _store().check(keys):
        time.sleep(POLL_SECONDS)
    return [json.loads(_store().get(key)) for key in keys]


def start_workers(count: int) -> None:
    """Start `count` - 1 workers; this process becomes rank 0.

    RuntimeError if this process is already one of several.
    """
    global _workers
    if environment.is_distributed() or dist.is_initialized():
        raise RuntimeError("this process is already one of several, and cannot start workers")
    _workers = WorkerProcesses(count)


def wait_for_workers() -> None:
    """Wait until all workers wait for the build command, so that a timed build excludes their start."""
    _store().wait([f"{READY_KEY}{rank}" for rank in range(1, environment.world_size())], COMMAND_TIMEOUT)


def build_on_all(build: Callable[..., Llama], **arguments: Any) -> Llama:
    """Call `build(**arguments)` in all processes -> a Driver of the model. The arguments must be JSON values.

    RuntimeError for a second model: workers hold one.
    """
    global _driver, _build_sent
    if _driver is not None:
        raise RuntimeError("the workers already have a model: call shut_down() first")
    _send_build_command({"build": _qualified_name(build), "arguments": arguments})
    _build_sent = True
    try:
        _driver = Driver(build(**arguments))
    except Exception as error:
        wait_for_crash_report(error)
        raise
    return cast(Llama, _driver)


def shut_down() -> None:
    """Shut down the workers, whether or not they have built a model. They cannot be used afterwards.

    Kills workers that this process started if they cannot receive the command.
    """
    global _driver, _workers, _workers_connected, _build_sent
    can_receive = not _build_sent if _driver is None else not _driver.out_of_step
    if _workers is not None:
        _workers.expect_exit()
    try:
        if _driver is not None and can_receive:
            _driver.shut_down()
        elif can_receive and (_workers_connected or _workers is not None):
            _send_build_command(None)
    except RuntimeError:  # a worker has crashed: torchrun reports it; if this process started them, stop the others
        if _workers is None:
            raise
        can_receive = False
    finally:
        if _workers is not None:
            _workers.stop(SHUTDOWN_SECONDS if can_receive else 0)
        _driver, _workers, _workers_connected, _build_sent = None, None, False, False
        _store.cache_clear()


def wait_for_crash_report(error: Exception) -> None:
    """After an error that may come from a crashed worker, give the watching thread time to report it and exit."""
    if isinstance(error, RuntimeError):
        time.sleep(3 * POLL_SECONDS)


def _qualified_name(function: Callable[..., Any]) -> str:
    """The function's name for `pkgutil.resolve_name`."""
    return f"{function.__module__}:{function.__qualname__}"


def _send_build_command(command: dict[str, Any] | None) -> None:
    _store().set(BUILD_KEY, json.dumps(command))


def receive_build_command() -> dict[str, Any] | None:
    """Wait for the driver's build command; None if the driver ends without building."""
    store = _store()
    try:
        store.set(f"{READY_KEY}{_distributed_environment().rank}", "")
        store.wait([BUILD_KEY], COMMAND_TIMEOUT)
        command: dict[str, Any] | None = json.loads(store.get(BUILD_KEY))
    except dist.DistError:  # the driver, which serves the store, has ended and reported why
        return None
    return command


@functools.cache
def _store() -> Any:
    """The store for messages between the processes before they are a group."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # after a restart, earlier messages do not count
    return dist.PrefixStore(f"fastllama {restart}", connect_store(_distributed_environment()))  # type: ignore[attr-defined]


def connect_workers() -> None:
    """Wait until all processes of the launch have connected. ValueError if some do not."""
    global _workers_connected
    _store()
    _workers_connected = True


def _distributed_environment() -> environment.DistributedEnvironment:
    launch = environment.distributed_environment()
    if launch is None:
        raise RuntimeError("this is the only process: WORLD_SIZE is 1 or not set")
    return launch


@functools.cache
def control_group() -> "dist.ProcessGroup":
    """The gloo group for commands between the hosts. All processes must create it together, at the first call."""
    model_parallel.connect_world()
    return dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)  # type: ignore[no-any-return]


def send_command(control: "dist.ProcessGroup", command: Any) -> None:
    """Send the workers a command; they wait for it in `receive_command`."""
    dist.broadcast_object_list([command], src=0, group=control)


def receive_command(control: "dist.ProcessGroup") -> Any:
    """Wait for the driver's next command."""
    received = [None]
    dist.broadcast_object_list(received, src=0, group=control)
    return received[0]


def send_increment_count(control: "dist.ProcessGroup", count: int) -> None:
    """Allow the workers `count` more increments of the open stream; 0 closes it."""
    dist.broadcast(torch.tensor([count], dtype=torch.int64, device="cpu"), src=0, group=control)


def receive_increment_count(control: "dist.ProcessGroup") -> int:
    """How many more increments of the open stream this worker may take; 0 closes it."""
    received = torch.zeros(1, dtype=torch.int64, device="cpu")
    dist.broadcast(received, src=0, group=control)
    return int(received)
