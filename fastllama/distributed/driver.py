"""A model shared with processes that repeat this one's calls, step by step.

A program that reads a terminal cannot run in several processes as it is. So the first process, the leader, is the
program; the others, the followers (`follower.py`), build the same model and are told every call. The leader grants the
increments of a stream, about a step's at a time, so that one which is closed or interrupted ends at the same place in
all.

Followers are started by the leader (`start`, in `started.py`), or all of them by torchrun.
"""

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from fastllama.distributed import environment
from fastllama.distributed.rendezvous import meet
from fastllama.distributed.worker_processes import POLL_SECONDS, WorkerProcesses
from fastllama.generation import Llama
from fastllama.stream import Increment, NotFiniteError

COMMAND_TIMEOUT = timedelta(days=365)  # of a follower for what is said next: people think
FORCE_QUIT_INTERRUPTS = 3  # interrupts, of somebody who does not want to wait for the end of a step
EXIT_INTERRUPTED = 130
SHUTDOWN_SECONDS = 10  # for followers that are dismissed
READABLE = ("model", "tokenizer", "formatter")  # of a Llama, what a program may look at
# Names in the store where all processes meet.
BUILD_COMMAND = "what to build"
READY = "ready "  # and its rank: a follower that waits for it

_driver: "Driver | None" = None
_workers_connected = False  # whether a launcher's processes are there to run_worker this one
_build_sent = False  # whether followers know what to build
_workers: WorkerProcesses | None = None


class Driver:
    """A Llama whose streams the followers run along with. `model`, `tokenizer` and `formatter` are there to be read."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._control = control_group()
        self.out_of_step = False  # an error here alone, after which nobody can say where the others are

    def __getattr__(self, name: str) -> Any:
        if name not in READABLE:
            raise AttributeError(f"{name!r} would run in this process alone: a leader streams, and calls `run_on_all`")
        return getattr(self._llm, name)

    def stream(self, prompt_tokens: Sequence[Sequence[int]], *arguments: Any, **keywords: Any) -> Generator[Increment]:
        """`Llama.stream`, on all processes. What it refuses is raised with the first increment."""
        inner: Generator[Increment] | None = None
        left, told, ended = 0, False, False
        call = {"arguments": (prompt_tokens, *arguments), "keywords": keywords}
        try:
            # Between these, and between two of a step's collectives, an interrupt would part this process from others.
            with _delay_interrupts():
                inner = self._llm.stream(prompt_tokens, *arguments, **keywords)
                send_command(self._control, call | {"stop_tokens": sorted(self._llm.tokenizer.stop_tokens)})
                told = True
            while True:
                with _delay_interrupts():
                    if not left:
                        left = len(prompt_tokens)
                        allow_increments(self._control, left)
                    left -= 1
                    try:
                        increment = next(inner)
                    except StopIteration:
                        ended = True
                        return
                yield increment
        except Exception as error:
            ended = True  # as it has for the others, by the same error or by their own end
            self.out_of_step |= told and not isinstance(error, NotFiniteError)
            wait_for_crash_report(error)
            raise
        finally:
            if inner is not None and told and not ended:
                with _delay_interrupts():
                    self._drain(inner, left)

    def _drain(self, inner: Generator[Increment], left: int) -> None:
        """End a stream that is closed early where the others do: when what was allowed_increments is used up."""
        if all(next(inner, None) is not None for _ in range(left)):
            allow_increments(self._control, 0)
        inner.close()

    def run_on_all(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """`function(llm, **arguments)`, in all processes at once -> what it returns here. Interrupts wait."""
        with _delay_interrupts():
            try:
                send_command(self._control, {"function": _name(function), "arguments": arguments})
                return function(self._llm, **arguments)
            except Exception as error:
                self.out_of_step = True
                wait_for_crash_report(error)
                raise

    def shut_down(self) -> None:
        """Let the followers end. No stream may be open."""
        send_command(self._control, None)


def run_on_all(llm: Llama, function: Callable[..., Any], **arguments: Any) -> Any:
    """`function(llm, **arguments)`, where a leader has the model in all processes -> what it returns here."""
    return llm.run_on_all(function, **arguments) if isinstance(llm, Driver) else function(llm, **arguments)


def start_workers(count: int) -> None:
    """Start `count` - 1 followers and make this process the first of all. A program does so once.

    RuntimeError where this process shares a model already, or has.
    """
    global _workers
    if environment.torchrun_started() or dist.is_initialized():
        raise RuntimeError("this process is one of several already, and starts no others")
    _workers = WorkerProcesses(count)


def wait_for_workers() -> None:
    """Wait until all of them wait for `lead`: what is timed from then on is no program's start."""
    _store().wait([f"{READY}{rank}" for rank in range(1, environment.world_size())], COMMAND_TIMEOUT)


def build_on_all(build: Callable[..., Llama], **arguments: Any) -> Llama:
    """What `build` makes of the arguments, which JSON can hold, in this process, the first, and in every follower.

    RuntimeError for a second model: followers have one.
    """
    global _driver, _build_sent
    if _driver is not None:
        raise RuntimeError("the followers have a model already: dismiss them first")
    _send_build_command({"build": _name(build), "arguments": arguments})
    _build_sent = True
    try:
        _driver = Driver(build(**arguments))
    except Exception as error:
        wait_for_crash_report(error)
        raise
    return cast(Llama, _driver)


def shut_down() -> None:
    """Let the followers end, whether or not they have built a model. It is the last that a program has of them.

    Those that this process started are killed where they would not receive_command of it.
    """
    global _driver, _workers, _workers_connected, _build_sent
    listening = not _build_sent if _driver is None else not _driver.out_of_step
    if _workers is not None:
        _workers.expect_exit()
    try:
        if _driver is not None and listening:
            _driver.shut_down()
        elif listening and (_workers_connected or _workers is not None):
            _send_build_command(None)
    except RuntimeError:  # one has died: torchrun says so; of those that this process started the others end, too
        if _workers is None:
            raise
        listening = False
    finally:
        if _workers is not None:
            _workers.end(SHUTDOWN_SECONDS if listening else 0)
        _driver, _workers, _workers_connected, _build_sent = None, None, False, False
        _store.cache_clear()


def wait_for_crash_report(error: Exception) -> None:
    """Where a lost connection may be the end of a follower, leave it to those who watch it to say so and end."""
    if isinstance(error, RuntimeError):
        time.sleep(3 * POLL_SECONDS)


def _name(function: Callable[..., Any]) -> str:
    """By which `pkgutil.resolve_name` finds it."""
    return f"{function.__module__}:{function.__qualname__}"


def _send_build_command(order: dict[str, Any] | None) -> None:
    _store().set(BUILD_COMMAND, json.dumps(order))


def receive_build_command() -> dict[str, Any] | None:
    """What the leader builds, as soon as it does; None where it ends without."""
    store = _store()
    try:
        store.set(f"{READY}{_launch().rank}", "")
        store.wait([BUILD_COMMAND], COMMAND_TIMEOUT)
        order: dict[str, Any] | None = json.loads(store.get(BUILD_COMMAND))
    except dist.DistError:  # the store has gone with the leader, who has said why
        return None
    return order


@functools.cache
def _store() -> Any:
    """What the processes of a launch say to each other before they are a group."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # what was said before is not meant for those after
    return dist.PrefixStore(f"fastllama {restart}", meet(_launch()))  # type: ignore[attr-defined]


def connect_workers() -> None:
    """Wait until all processes of the launch are there, to run_worker this one. ValueError where they do not come."""
    global _workers_connected
    _store()
    _workers_connected = True


def _launch() -> environment.Launch:
    found = environment.several()
    if found is None:
        raise RuntimeError("this process is the only one: WORLD_SIZE says so, or nothing")
    return found


def control_group() -> "dist.ProcessGroup":
    """Between the same processes, for what the host has to say; all of them make it together."""
    return dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)  # type: ignore[no-any-return]


def send_command(control: "dist.ProcessGroup", message: Any) -> None:
    """What the followers `receive_command` next."""
    dist.broadcast_object_list([message], src=0, group=control)


def receive_command(control: "dist.ProcessGroup") -> Any:
    """What the leader says next."""
    found = [None]
    dist.broadcast_object_list(found, src=0, group=control)
    return found[0]


def allow_increments(control: "dist.ProcessGroup", count: int) -> None:
    """So many more increments of the open stream, or its end: what the followers find `allowed_increments` next."""
    dist.broadcast(torch.tensor([count], dtype=torch.int64, device="cpu"), src=0, group=control)


def allowed_increments(control: "dist.ProcessGroup") -> int:
    """How many more increments of the open stream the leader takes; 0 where it closes it."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    dist.broadcast(found, src=0, group=control)
    return int(found)


@contextlib.contextmanager
def _delay_interrupts() -> Iterator[None]:
    """Hold back Ctrl-C to the end of the block, unless it is pressed again and again."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a shell's background
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) >= FORCE_QUIT_INTERRUPTS:
            os._exit(EXIT_INTERRUPTED)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
