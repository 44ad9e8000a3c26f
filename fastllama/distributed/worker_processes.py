"""Workers that the driver starts itself: their environment, the thread that watches them, and the crash report.

When a worker crashes, the driver reports it and exits. When the driver ends, the workers' stdin pipes close, and they
exit.
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
EXIT_WORKER_CRASHED = 2
STDERR = 2
TORCH_RANK_PREFIX = r"^\[rank\d+\]: "  # torch puts it before a traceback's lines

exit_hooks: list[Callable[[], object]] = []  # called before a worker's crash ends this process


class WorkerProcesses:
    """Starts the workers, ranks 1 to count - 1, and sets this process's environment variables as rank 0."""

    def __init__(self, count: int) -> None:
        # This process serves the store, for this machine only. Port 0 takes a free port.
        listener = socket.create_server((HOST, 0))
        port = listener.getsockname()[1]
        options: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
        self._store = dist.TCPStore(HOST, port, **options)  # type: ignore[attr-defined]
        self._n_threads = torch.get_num_threads()
        self._restore_terminal = _terminal_restorer()
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store exists already
        }
        driver_variables = shared | {"RANK": "0", "LOCAL_RANK": "0"}
        self._saved_environ = {name: os.environ.get(name) for name in driver_variables}
        os.environ |= driver_variables
        if os.environ.get("OMP_NUM_THREADS") != str(self._n_threads):  # else the user has set threads per process
            n_threads_each = max(1, threads.available() // count)
            torch.set_num_threads(n_threads_each)
            shared["OMP_NUM_THREADS"] = str(n_threads_each)
        # For the workers' stderr. The files have no name, so they are deleted in any case when this process ends.
        self._open_files = contextlib.ExitStack()
        self._logs = [self._open_files.enter_context(_anonymous_file()) for _ in range(1, count)]
        self._processes = [_start_worker(rank, shared, log) for rank, log in enumerate(self._logs, 1)]
        self._exit_expected = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def expect_exit(self) -> None:
        """Stop treating a worker's exit as a crash."""
        self._exit_expected.set()

    def stop(self, seconds: float) -> None:
        """Wait up to `seconds` for workers to exit, kill the others, and restore the threads and environment."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._open_files.close()
        torch.set_num_threads(self._n_threads)
        for name, value in self._saved_environ.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _watch(self) -> None:
        while not self._exit_expected.wait(POLL_SECONDS):
            for rank, process in enumerate(self._processes, 1):
                if process.poll() is not None and not self._exit_expected.is_set():
                    self._exit_after_crash(rank, process.returncode)

    def _exit_after_crash(self, rank: int, code: int) -> None:
        """Kill the workers, report the crash and end this process, even while its main thread waits in a collective."""
        try:
            for process in self._processes:
                process.kill()
            os.write(STDERR, f"fastllama: error: {self._crash_report(rank, code)}\n".encode())
            self._restore_terminal()
            _flush_stdout()
            for hook in exit_hooks:
                hook()
        finally:
            os._exit(EXIT_WORKER_CRASHED)

    def _crash_report(self, rank: int, code: int) -> str:
        process = f"process {rank} of {len(self._processes) + 1}"
        if code < 0:
            name = next((f" ({known.name})" for known in signal.Signals if known == -code), "")
            return f"{process} was killed by signal {-code}{name}"
        log = self._logs[rank - 1]
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
        last = f": {re.sub(TORCH_RANK_PREFIX, '', lines[-1])}" if lines else ""
        return f"{process} ended with code {code}{last}"


def _anonymous_file() -> contextlib.AbstractContextManager[IO[bytes]]:
    return tempfile.TemporaryFile()


def _start_worker(rank: int, shared: dict[str, str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", WORKER_MODULE],
        stdin=subprocess.PIPE,  # it closes when this process ends, and the worker exits
        stdout=subprocess.DEVNULL,
        stderr=log,
        env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        start_new_session=True,  # Ctrl-C reaches only this process
    )


def _terminal_restorer() -> Callable[[], None]:
    """A function that restores the terminal's current settings, which line editing changes while it waits for input."""
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        return lambda: None
    import termios

    terminal = sys.stdin.fileno()
    state = termios.tcgetattr(terminal)

    def restore() -> None:
        if os.tcgetpgrp(terminal) == os.getpgrp():  # in the background, tcsetattr would stop this process
            termios.tcsetattr(terminal, termios.TCSANOW, state)

    return restore


def _flush_stdout() -> None:
    """Flush stdout, for at most FLUSH_SECONDS: its reader may not read."""

    def flush() -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(FLUSH_SECONDS)
