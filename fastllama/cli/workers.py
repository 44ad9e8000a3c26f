"""--nproc: a model shared with processes that this one starts, which repeat its calls step by step.

This process stays at the terminal, as the first of the group; the others (`follower.py`) build the same model and are
told every call. Before each increment the leader says whether to go on, so that a stream that is closed or interrupted
ends at the same place in all. When a follower dies this process says so and ends; when this one dies its pipes close,
and the followers end.
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
from collections.abc import Generator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch.distributed as dist

    from fastllama.generation import Llama
    from fastllama.stream import Increment

FOLLOWER = "fastllama.cli.follower"
HOST = "127.0.0.1"
POLL_SECONDS = 0.2
PATIENCE = timedelta(days=365)  # of a follower for what is said next: people think
EXIT_WORKER_DIED = 2

_workers: list["subprocess.Popen[bytes]"] = []  # the followers, by rank from 1
_keep: list[Any] = []  # what has to live as long as the process


class Leader:
    """A Llama whose streams the followers run along with. Everything else is the Llama's own."""

    def __init__(self, llm: "Llama") -> None:
        self._llm = llm
        self._control = control_group()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def stream(self, *arguments: Any, **keywords: Any) -> "Generator[Increment]":
        """`Llama.stream`, on all processes."""
        inner = self._llm.stream(*arguments, **keywords)  # refuses here what the followers need not hear of
        return self._led(inner, arguments, keywords)

    def _led(self, inner: Any, arguments: Any, keywords: Any) -> "Generator[Increment]":
        tell(self._control, {"arguments": arguments, "keywords": keywords})
        ended = False
        try:
            while True:
                with _interrupts_later():  # between two of a step's sums the others would wait for ever
                    say_whether(self._control, True)
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
                say_whether(self._control, False)
                inner.close()


def start(count: int, arguments: dict[str, Any]) -> None:
    """Start the other `count` - 1 processes and make this one the first of them.

    All build with `arguments`, Llama.build's, this one next. A thread watches the others to the end of this process.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # The meeting point is this process's own, on a port of its choosing, so that none is taken twice.
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": HOST, "MASTER_PORT": str(store.port)}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
    _share_cores(count)
    folder = tempfile.TemporaryDirectory(prefix="fastllama-workers-")
    logs = Path(folder.name)
    for rank in range(1, count):
        with (logs / f"{rank}").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", FOLLOWER],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # Ctrl-C is for this process
            )
        _workers.append(process)
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # the watcher will say why
                process.stdin.write((json.dumps(arguments) + "\n").encode())
                process.stdin.flush()
    _keep.extend((store, folder))
    threading.Thread(target=_watch, args=(logs,), daemon=True).start()


def _share_cores(count: int) -> None:
    """As many threads for each process as leave none waiting, unless the user says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        threads = max(1, torch.get_num_threads() // count)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _watch(logs: Path) -> None:
    """End this process as soon as one of the others has ended."""
    while True:
        for rank, process in enumerate(_workers, 1):
            if process.poll() is not None:
                for other in _workers:
                    other.kill()
                click.echo(f"fastllama: error: {_obituary(rank, process.returncode, logs)}", err=True)
                sys.stdout.flush()
                os._exit(EXIT_WORKER_DIED)
        time.sleep(POLL_SECONDS)


def mourn(error: Exception) -> None:
    """Where a lost connection may be the end of a worker, leave it to the watcher to say so and end."""
    if isinstance(error, RuntimeError):
        time.sleep(3 * POLL_SECONDS)


def _obituary(rank: int, code: int, logs: Path) -> str:
    how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
    lines = (logs / f"{rank}").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"process {rank} of {len(_workers) + 1} {how}" + (f": {lines[-1]}" if lines and code > 0 else "")


def control_group() -> "dist.ProcessGroup":
    """Between the same processes, for what the host has to say; all of them make it together."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[no-any-return]


def tell(control: "dist.ProcessGroup", message: Any) -> None:
    """What the followers `hear` next."""
    import torch.distributed as dist

    dist.broadcast_object_list([message], src=0, group=control)


def hear(control: "dist.ProcessGroup") -> Any:
    """What the leader says next."""
    import torch.distributed as dist

    found = [None]
    dist.broadcast_object_list(found, src=0, group=control)
    return found[0]


def say_whether(control: "dist.ProcessGroup", goes_on: bool) -> None:
    """Whether there is another step: what the followers `hear_whether` next."""
    import torch
    import torch.distributed as dist

    dist.broadcast(torch.tensor([goes_on]), src=0, group=control)


def hear_whether(control: "dist.ProcessGroup") -> bool:
    """Whether the leader takes another step."""
    import torch
    import torch.distributed as dist

    found = torch.zeros(1, dtype=torch.bool)
    dist.broadcast(found, src=0, group=control)
    return bool(found)


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
