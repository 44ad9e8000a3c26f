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

from fastllama import launch
from fastllama.generation import Llama
from fastllama.rendezvous import meet
from fastllama.started import POLL_SECONDS, StartedFollowers
from fastllama.stream import Increment, NotFiniteError

PATIENCE = timedelta(days=365)  # of a follower for what is said next: people think
INSISTENT = 3  # interrupts, of somebody who does not want to wait for the end of a step
EXIT_INTERRUPTED = 130
END_SECONDS = 10  # for followers that are dismissed
LED = ("model", "tokenizer", "formatter")  # of a Llama, what a program may look at
# Names in the store where all processes meet.
ORDER = "what to build"
READY = "ready "  # and its rank: a follower that waits for it

_leader: "Leader | None" = None
_gathered = False  # whether a launcher's processes are there to follow this one
_ordered = False  # whether followers know what to build
_started: StartedFollowers | None = None


class Leader:
    """A Llama whose streams the followers run along with. `model`, `tokenizer` and `formatter` are there to be read."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._control = control_group()
        self.parted = False  # an error here alone, after which nobody can say where the others are

    def __getattr__(self, name: str) -> Any:
        if name not in LED:
            raise AttributeError(f"{name!r} would run in this process alone: a leader streams, and calls `together`")
        return getattr(self._llm, name)

    def stream(self, prompt_tokens: Sequence[Sequence[int]], *arguments: Any, **keywords: Any) -> Generator[Increment]:
        """`Llama.stream`, on all processes. What it refuses is raised with the first increment."""
        inner: Generator[Increment] | None = None
        left, told, ended = 0, False, False
        call = {"arguments": (prompt_tokens, *arguments), "keywords": keywords}
        try:
            # Between these, and between two of a step's collectives, an interrupt would part this process from others.
            with _interrupts_later():
                inner = self._llm.stream(prompt_tokens, *arguments, **keywords)
                tell(self._control, call | {"stop_tokens": sorted(self._llm.tokenizer.stop_tokens)})
                told = True
            while True:
                with _interrupts_later():
                    if not left:
                        left = len(prompt_tokens)
                        grant(self._control, left)
                    left -= 1
                    try:
                        increment = next(inner)
                    except StopIteration:
                        ended = True
                        return
                yield increment
        except Exception as error:
            ended = True  # as it has for the others, by the same error or by their own end
            self.parted |= told and not isinstance(error, NotFiniteError)
            await_obituary(error)
            raise
        finally:
            if inner is not None and told and not ended:
                with _interrupts_later():
                    self._run_out(inner, left)

    def _run_out(self, inner: Generator[Increment], left: int) -> None:
        """End a stream that is closed early where the others do: when what was granted is used up."""
        if all(next(inner, None) is not None for _ in range(left)):
            grant(self._control, 0)
        inner.close()

    def together(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """`function(llm, **arguments)`, in all processes at once -> what it returns here. Interrupts wait."""
        with _interrupts_later():
            try:
                tell(self._control, {"function": _name(function), "arguments": arguments})
                return function(self._llm, **arguments)
            except Exception as error:
                self.parted = True
                await_obituary(error)
                raise

    def dismiss(self) -> None:
        """Let the followers end. No stream may be open."""
        tell(self._control, None)


def together(llm: Llama, function: Callable[..., Any], **arguments: Any) -> Any:
    """`function(llm, **arguments)`, where a leader has the model in all processes -> what it returns here."""
    return llm.together(function, **arguments) if isinstance(llm, Leader) else function(llm, **arguments)


def start(count: int) -> None:
    """Start `count` - 1 followers and make this process the first of all. A program does so once.

    RuntimeError where this process shares a model already, or has.
    """
    global _started
    if launch.torchrun_started() or dist.is_initialized():
        raise RuntimeError("this process is one of several already, and starts no others")
    _started = StartedFollowers(count)


def await_followers() -> None:
    """Wait until all of them wait for `lead`: what is timed from then on is no program's start."""
    _meeting_point().wait([f"{READY}{rank}" for rank in range(1, launch.world_size())], PATIENCE)


def lead(build: Callable[..., Llama], **arguments: Any) -> Llama:
    """What `build` makes of the arguments, which JSON can hold, in this process, the first, and in every follower.

    RuntimeError for a second model: followers have one.
    """
    global _leader, _ordered
    if _leader is not None:
        raise RuntimeError("the followers have a model already: dismiss them first")
    _order({"build": _name(build), "arguments": arguments})
    _ordered = True
    try:
        _leader = Leader(build(**arguments))
    except Exception as error:
        await_obituary(error)
        raise
    return cast(Llama, _leader)


def dismiss() -> None:
    """Let the followers end, whether or not they have built a model. It is the last that a program has of them.

    Those that this process started are killed where they would not hear of it.
    """
    global _leader, _started, _gathered, _ordered
    listening = not _ordered if _leader is None else not _leader.parted
    if _started is not None:
        _started.may_end()
    try:
        if _leader is not None and listening:
            _leader.dismiss()
        elif listening and (_gathered or _started is not None):
            _order(None)
    except RuntimeError:  # one has died: torchrun says so; of those that this process started the others end, too
        if _started is None:
            raise
        listening = False
    finally:
        if _started is not None:
            _started.end(END_SECONDS if listening else 0)
        _leader, _started, _gathered, _ordered = None, None, False, False
        _meeting_point.cache_clear()


def await_obituary(error: Exception) -> None:
    """Where a lost connection may be the end of a follower, leave it to those who watch it to say so and end."""
    if isinstance(error, RuntimeError):
        time.sleep(3 * POLL_SECONDS)


def _name(function: Callable[..., Any]) -> str:
    """By which `pkgutil.resolve_name` finds it."""
    return f"{function.__module__}:{function.__qualname__}"


def _order(order: dict[str, Any] | None) -> None:
    _meeting_point().set(ORDER, json.dumps(order))


def hear_order() -> dict[str, Any] | None:
    """What the leader builds, as soon as it does; None where it ends without."""
    store = _meeting_point()
    try:
        store.set(f"{READY}{_launch().rank}", "")
        store.wait([ORDER], PATIENCE)
        order: dict[str, Any] | None = json.loads(store.get(ORDER))
    except dist.DistError:  # the store has gone with the leader, who has said why
        return None
    return order


@functools.cache
def _meeting_point() -> Any:
    """What the processes of a launch say to each other before they are a group."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # what was said before is not meant for those after
    return dist.PrefixStore(f"fastllama {restart}", meet(_launch()))  # type: ignore[attr-defined]


def gather() -> None:
    """Wait until all processes of the launch are there, to follow this one. ValueError where they do not come."""
    global _gathered
    _meeting_point()
    _gathered = True


def _launch() -> launch.Launch:
    found = launch.several()
    if found is None:
        raise RuntimeError("this process is the only one: WORLD_SIZE says so, or nothing")
    return found


def control_group() -> "dist.ProcessGroup":
    """Between the same processes, for what the host has to say; all of them make it together."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[no-any-return]


def tell(control: "dist.ProcessGroup", message: Any) -> None:
    """What the followers `hear` next."""
    dist.broadcast_object_list([message], src=0, group=control)


def hear(control: "dist.ProcessGroup") -> Any:
    """What the leader says next."""
    found = [None]
    dist.broadcast_object_list(found, src=0, group=control)
    return found[0]


def grant(control: "dist.ProcessGroup", count: int) -> None:
    """So many more increments of the open stream, or its end: what the followers find `granted` next."""
    dist.broadcast(torch.tensor([count], dtype=torch.int64, device="cpu"), src=0, group=control)


def granted(control: "dist.ProcessGroup") -> int:
    """How many more increments of the open stream the leader takes; 0 where it closes it."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    dist.broadcast(found, src=0, group=control)
    return int(found)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold back Ctrl-C to the end of the block, unless it is pressed again and again."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a shell's background
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) >= INSISTENT:
            os._exit(EXIT_INTERRUPTED)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
