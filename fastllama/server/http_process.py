"""A process for HTTP: connections, bodies, texts and prompts. The engine runs in the one that has started it.

    with HttpProcess(listener) as http:          # while it starts, the model is loaded
        http.begin(engine, served, ServerSettings())
        http.wait()

Signals are for the engine's process, which passes them on: SIGTERM or Ctrl-C once to end in order, twice to end at
once, three times to end without waiting for a step. Ctrl-C in a terminal reaches both processes, and this one does not
heed it.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from fastllama.distributed.interrupts import EXIT_INTERRUPTED, FORCE_QUIT_INTERRUPTS
from fastllama.engine.engine import Engine
from fastllama.engine.engine_host import EngineHost
from fastllama.engine.facts import Facts
from fastllama.engine.messages import Failure, Listening, Stop
from fastllama.engine.recovery import describe
from fastllama.engine.remote_engine import GONE, RemoteEngine
from fastllama.openai_api.envelope import ServedModel
from fastllama.server.settings import ServerSettings

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.25  # between looks at the engine
LISTENING_POLL_SECONDS = 0.05
SWITCH_SECONDS = 2e-4  # that a thread waits for another one of this process


class Setup(NamedTuple):
    """What the process has to know."""

    facts: Facts
    served: ServedModel
    settings: ServerSettings
    root_path: str
    log_level: str


class HttpProcess:
    """Serves an engine of this process from another one, which starts at once."""

    def __init__(self, listener: socket.socket) -> None:
        """listener: bound to the address. The process gets it, and this one closes it."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run_http, args=(theirs, listener), name="fastllama http", daemon=True)
        self._n_signals = 0
        self._engine: Engine | None = None
        self._host: EngineHost | None = None
        with closing(theirs), closing(listener), _handled([signal.SIGINT], signal.SIG_IGN):
            self._process.start()  # it inherits that

    def begin(
        self,
        engine: Engine,
        served: ServedModel,
        settings: ServerSettings,
        *,
        root_path: str = "",
        log_level: str = "warning",
    ) -> None:
        """Serve an engine that runs in its own thread. Waits until the process listens.

        Raises ChildProcessError if the process has ended.
        """
        self._engine, self._host = engine, EngineHost(engine, self._connection)
        with suppress(OSError):  # it has ended, which is said below
            self._connection.send(Setup(Facts.of(engine.llm), served, settings, root_path, log_level))
        self._host.start()
        while not self._host.listening.wait(LISTENING_POLL_SECONDS):
            if not self._process.is_alive():
                raise self._ended()
            if self._host.failure is not None:
                raise RuntimeError("the process that serves HTTP cannot be talked to") from self._host.failure

    def wait(self, on_start: Callable[[], None] = lambda: None) -> None:
        """Wait for the end, which signals bring about, if this is the main thread.

        on_start: called once they do. Raises RuntimeError with the reason if the engine cannot go on, and
        ChildProcessError if the process has ended without a signal.
        """
        if self._engine is None or self._host is None:
            raise RuntimeError("nothing is served: call begin() first")
        engine, host = self._engine, self._host
        with _handled(SIGNALS, self._handle_signal):
            on_start()
            is_told = False
            while not connection.wait([self._process.sentinel], POLL_SECONDS) and host.failure is None:
                if engine.failure is not None and not is_told:
                    host.tell(Failure(describe(engine.failure)))
                    is_told = True
        failure = engine.failure or host.failure
        if failure is not None:
            raise RuntimeError(f"the engine cannot go on: {failure}") from failure
        self._process.join()
        if self._process.exitcode:
            raise self._ended()

    def _ended(self) -> ChildProcessError:
        """The error of a process that has ended by itself."""
        return ChildProcessError(
            f"the process that serves HTTP has ended (exit code {self._process.exitcode}): what it printed before says "
            "why"
        )

    def __enter__(self) -> "HttpProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # it has ended, or nothing that it does is wanted any more
        self._process.join()
        if self._host is not None:  # its threads hold the model, which must not be freed while Python ends
            self._host.join()
        self._connection.close()

    def _handle_signal(self, number: int, frame: Any) -> None:
        """Pass a signal on."""
        self._n_signals += 1
        if self._n_signals >= FORCE_QUIT_INTERRUPTS:
            self._process.kill()
            os._exit(EXIT_INTERRUPTED)
        if self._host is not None:
            self._host.tell(Stop(at_once=self._n_signals > 1))


def run_http(pipe: Connection, listener: socket.socket) -> None:
    """The process: serve HTTP until the other one says that it is to end, or is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_SECONDS)
    from fastllama.server import run
    from fastllama.server.service import Service

    try:
        setup: Setup = pipe.recv()
    except (EOFError, OSError):  # there is no model
        return
    run.raise_descriptor_limit()
    engine = RemoteEngine(pipe, setup.facts)
    service = Service(engine, setup.served, setup.settings)
    config = run.configure(service, root_path=setup.root_path, log_level=setup.log_level)
    server = run.Server(config, service, on_start=lambda: engine.tell(Listening()))
    engine.on_stop = lambda at_once: server.stop(at_once=at_once)
    engine.start()
    with closing(listener):
        try:
            listener.listen(run.BACKLOG)  # uvloop would pass over its error
        except OSError as error:  # another program listens there since
            sys.exit(f"fastllama serve: cannot listen on port {listener.getsockname()[1]} ({error.strerror or error})")
        server.run(sockets=[listener])
    if engine.has_lost_engine:
        sys.exit(f"fastllama serve: {GONE}")


@contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """A block in which signals have this handler. In another thread than the main one it is an ordinary block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, old in before:
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: it was not Python's
