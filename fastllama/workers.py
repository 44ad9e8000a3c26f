"""A model shared with processes that repeat this one's calls, step by step.

A program that reads a terminal cannot run in several processes as it is. So the first process, the leader, is the
program; the others, the followers (`follower.py`), build the same model and are told every call. The leader grants the
increments of a stream, about a step's at a time, so that one which is closed or interrupted ends at the same place in
all.

Followers are started by the leader (`start`), or all of them by torchrun. When a follower that the leader started dies,
the leader says so and ends; when the leader dies its pipes close, and the followers end. torchrun sees to it itself.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fastllama import parallel
from fastllama.generation import Llama
from fastllama.stream import Increment

FOLLOWER = "fastllama.follower"
HOST = "127.0.0.1"
POLL_SECONDS = 0.2
PATIENCE = timedelta(days=365)  # of a follower for what is said next: people think
END_SECONDS = 10  # for a follower that is dismissed
EXIT_WORKER_DIED = 2
# Names in the store where all processes meet.
ORDER = "what to build"
READY = "ready "  # and its rank: a follower that waits for it

_started: list["_Followers"] = []  # those of `start`
_leaders: list["Leader"] = []  # that followers wait for


class Leader:
    """A Llama whose streams the followers run along with. Everything else is the Llama's own."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._control = control_group()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def stream(self, prompt_tokens: Sequence[Sequence[int]], *arguments: Any, **keywords: Any) -> Generator[Increment]:
        """`Llama.stream`, on all processes. What it refuses is raised with the first increment."""
        inner = self._llm.stream(
            prompt_tokens, *arguments, **keywords
        )  # what it refuses the followers need not hear of
        stop_tokens = sorted(self._llm.tokenizer.stop_tokens)
        tell(
            self._control, {"arguments": (prompt_tokens, *arguments), "keywords": keywords, "stop_tokens": stop_tokens}
        )
        left, ended = 0, False
        try:
            while True:
                with _interrupts_later():  # between two of a step's sums the others would wait for ever
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
            mourn(error)
            raise
        finally:
            if not ended:
                with _interrupts_later():
                    self._run_out(inner, left)

    def _run_out(self, inner: Generator[Increment], left: int) -> None:
        """End a stream that is closed early where the others do: when what was granted is used up."""
        if all(next(inner, None) is not None for _ in range(left)):
            grant(self._control, 0)
        inner.close()

    def together(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """`function(llm, **arguments)`, in all processes at once -> what it returns here."""
        tell(self._control, {"function": _name(function), "arguments": arguments})
        return function(self._llm, **arguments)

    def dismiss(self) -> None:
        """Let the followers end. No stream may be open."""
        tell(self._control, None)


def together(llm: Llama, function: Callable[..., Any], **arguments: Any) -> Any:
    """`function(llm, **arguments)`, where a leader has the model in all processes -> what it returns here."""
    return llm.together(function, **arguments) if isinstance(llm, Leader) else function(llm, **arguments)


def lead(build: Callable[..., Llama], **arguments: Any) -> Llama:
    """What `build` makes of the arguments, which JSON can hold, in this process, the first, and in every follower."""
    _order({"build": _name(build), "arguments": arguments})
    try:
        leader = Leader(build(**arguments))
    except Exception as error:
        mourn(error)
        raise
    _leaders.append(leader)
    return cast(Llama, leader)


def dismiss() -> None:
    """Let the followers end. It is the last that a program does with a model that it shared."""
    if not _leaders and parallel.torchrun_started():
        _order(None)
    while _leaders:
        _leaders.pop().dismiss()
    while _started:
        _started.pop().end()


def start(count: int) -> None:
    """Start `count` - 1 followers and make this process the first of all, as torchrun would.

    Watches them in a thread, to the end of this process, which is theirs.
    """
    _started.append(_Followers(count))


def await_followers() -> None:
    """Wait until all of them wait for `lead`: what is timed from then on is no program's start."""
    _meeting_point().wait([f"{READY}{rank}" for rank in range(1, parallel.world_size())], PATIENCE)


class _Followers:
    """The processes beside this one, by rank from 1."""

    def __init__(self, count: int) -> None:
        # The meeting point is this process's own, on a port of its choosing, so that none is taken twice.
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._folder = tempfile.TemporaryDirectory(prefix="fastllama-workers-")
        self._threads = torch.get_num_threads()
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": HOST, "MASTER_PORT": str(self._store.port)}
        shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
        if "OMP_NUM_THREADS" not in os.environ:  # as many threads for each process as leave none waiting
            threads = max(1, self._threads // count)
            torch.set_num_threads(threads)
            shared["OMP_NUM_THREADS"] = str(threads)
        self._processes = [self._start(rank, shared) for rank in range(1, count)]
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self, rank: int, shared: dict[str, str]) -> "subprocess.Popen[bytes]":
        with self._log(rank).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", FOLLOWER],
                stdin=subprocess.PIPE,  # whose end tells it that this process has ended
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # Ctrl-C is for this process
            )

    def end(self) -> None:
        """Wait for followers that are dismissed, and take back their cores."""
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        torch.set_num_threads(self._threads)

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name, str(rank))

    def _watch(self) -> None:
        """End this process as soon as one of the others has ended otherwise than by being dismissed."""
        while True:
            for rank, process in enumerate(self._processes, 1):
                if process.poll():
                    for other in self._processes:
                        other.kill()
                    print(f"fastllama: error: {self._obituary(rank, process.returncode)}", file=sys.stderr, flush=True)
                    sys.stdout.flush()
                    os._exit(EXIT_WORKER_DIED)
            time.sleep(POLL_SECONDS)

    def _obituary(self, rank: int, code: int) -> str:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        lines = self._log(rank).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = f": {lines[-1]}" if lines and code > 0 else ""
        return f"process {rank} of {len(self._processes) + 1} {how}{why}"


def mourn(error: Exception) -> None:
    """Where a lost connection may be the end of a follower, leave it to the watcher to say so and end."""
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
    store.set(READY + os.environ["RANK"], "")
    store.wait([ORDER], PATIENCE)
    order: dict[str, Any] | None = json.loads(store.get(ORDER))
    return order


def _meeting_point() -> Any:
    """The store where torchrun's processes find each other."""
    store, _, _ = next(rendezvous("env://"))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # what was said before is not meant for those after
    return dist.PrefixStore(f"fastllama {restart}", store)  # type: ignore[attr-defined]


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
    dist.broadcast(torch.tensor([count]), src=0, group=control)


def granted(control: "dist.ProcessGroup") -> int:
    """How many more increments of the open stream the leader takes; 0 where it closes it."""
    found = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(found, src=0, group=control)
    return int(found)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold back Ctrl-C to the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
