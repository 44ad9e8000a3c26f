"""The followers that a leader starts itself: their environment, the watch over them, and what is said when one dies.

When a follower dies, the leader says so and ends; when the leader dies their pipes close, and the followers end.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, Any

import torch
import torch.distributed as dist

from fastllama import threads

WORKER_MODULE = "fastllama.distributed.worker"
HOST = "127.0.0.1"
POLL_SECONDS = 0.2
FLUSH_SECONDS = 1
EXIT_WORKER_DIED = 2
STDERR = 2
TORCHS_PREFIX = r"^\[rank\d+\]: "  # of tracebacks

exit_hooks: list[Callable[[], object]] = []  # of this process, where the death of a follower ends it


class WorkerProcesses:
    """The processes beside this one, by rank from 1. This one's environment says that it is the first."""

    def __init__(self, count: int) -> None:
        # The meeting point is this process's own, on a port of its choosing, so that none is taken twice; and for this
        # machine alone.
        listening = socket.create_server((HOST, 0))
        port = listening.getsockname()[1]
        how: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listening.detach()}
        self._store = dist.TCPStore(HOST, port, **how)  # type: ignore[attr-defined]
        self._threads = torch.get_num_threads()
        self._restore_terminal = _terminal()
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # nobody else is to keep the store
        }
        mine = shared | {"RANK": "0", "LOCAL_RANK": "0"}
        self._before = {name: os.environ.get(name) for name in mine}
        os.environ |= mine
        if os.environ.get("OMP_NUM_THREADS") != str(self._threads):  # as many for each process as leave none waiting
            each = max(1, threads.available() // count)
            torch.set_num_threads(each)
            shared["OMP_NUM_THREADS"] = str(each)
        # What a follower says of itself goes to a file without a name, so that none is left, however this one ends.
        self._open = contextlib.ExitStack()
        self._logs = [self._open.enter_context(_anonymous_file()) for _ in range(1, count)]
        self._processes = [_start(rank, shared, log) for rank, log in enumerate(self._logs, 1)]
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def expect_exit(self) -> None:
        """From now on a follower that ends is none that died."""
        self._over.set()

    def end(self, seconds: float) -> None:
        """Wait so long for followers that are dismissed, then kill; take back the cores and the environment."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._open.close()
        torch.set_num_threads(self._threads)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            for rank, process in enumerate(self._processes, 1):
                if process.poll() is not None and not self._over.is_set():
                    self._exit_because_of(rank, process.returncode)

    def _exit_because_of(self, rank: int, code: int) -> None:
        """End this process, from any thread and whatever the others are waiting for, and say why."""
        try:
            for process in self._processes:
                process.kill()
            os.write(STDERR, f"fastllama: error: {self._crash_report(rank, code)}\n".encode())
            self._restore_terminal()
            _flush_stdout()
            for act in exit_hooks:
                act()
        finally:
            os._exit(EXIT_WORKER_DIED)

    def _crash_report(self, rank: int, code: int) -> str:
        which = f"process {rank} of {len(self._processes) + 1}"
        if code < 0:
            name = next((f" ({one.name})" for one in signal.Signals if one == -code), "")
            return f"{which} was killed by signal {-code}{name}"
        log = self._logs[rank - 1]
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
        last = f": {re.sub(TORCHS_PREFIX, '', lines[-1])}" if lines else ""
        return f"{which} ended with code {code}{last}"


def _anonymous_file() -> contextlib.AbstractContextManager[IO[bytes]]:
    return tempfile.TemporaryFile()


def _start(rank: int, shared: dict[str, str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", WORKER_MODULE],
        stdin=subprocess.PIPE,  # whose end tells it that this process has ended
        stdout=subprocess.DEVNULL,
        stderr=log,
        env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        start_new_session=True,  # Ctrl-C is for this process
    )


def _terminal() -> Callable[[], None]:
    """What puts the terminal back into the state that it is in now: line editing changes it while it waits."""
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        return lambda: None
    import termios

    terminal = sys.stdin.fileno()
    state = termios.tcgetattr(terminal)

    def restore() -> None:
        if os.tcgetpgrp(terminal) == os.getpgrp():  # it is ours: in the background it would stop us
            termios.tcsetattr(terminal, termios.TCSANOW, state)

    return restore


def _flush_stdout() -> None:
    """What was printed, unless the reader does not take it."""

    def flush() -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(FLUSH_SECONDS)
