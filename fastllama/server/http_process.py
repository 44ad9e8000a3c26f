"""A process for HTTP: connections, bodies, texts and prompts. The engine runs in the one that has started it.

    with HttpProcess(listener) as http:          # while it starts, the model is loaded
        http.serve(engine, served, ServerSettings())

Signals are for the engine's process, which passes them on: SIGTERM or Ctrl-C once to end in order, twice to end at
once, three times to end without waiting. Ctrl-C in a terminal reaches both processes, and this one does not heed it.
"""

import multiprocessing
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from fastllama.engine.engine import Engine
from fastllama.engine.engine_host import EngineHost
from fastllama.engine.facts import Facts
from fastllama.engine.messages import Failure, Listening, Stop
from fastllama.engine.recovery import describe
from fastllama.engine.remote_engine import GONE, RemoteEngine
from fastllama.openai_api.envelope import ServedModel
from fastllama.server.settings import ServerSettings

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALS_TO_KILL = 3
POLL_SECONDS = 0.25  # between looks at the engine
END_SECONDS = 5  # for the process to end
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
        self._n_signals, self._has_served = 0, False
        with closing(theirs), closing(listener), _ignored_interrupts():  # which the process inherits
            self._process.start()

    def serve(
        self,
        engine: Engine,
        served: ServedModel,
        settings: ServerSettings,
        *,
        root_path: str = "",
        log_level: str = "warning",
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve until a signal.

        Raises RuntimeError with the reason if the engine cannot go on, and ChildProcessError if the process has ended.
        on_start: called once the process listens. Signals are handled in the main thread only.
        """
        host = EngineHost(engine, self._connection)
        host.on_listening, self._has_served = on_start, True
        with suppress(OSError):  # it has ended, which is said below
            self._connection.send(Setup(Facts.of(engine.llm), served, settings, root_path, log_level))
        with self._handled_signals(host.start()):
            has_told = False
            while not connection.wait([self._process.sentinel], POLL_SECONDS):
                if engine.failure is not None and not has_told:
                    host.tell(Failure(describe(engine.failure)))
                    has_told = True
        if engine.failure is not None:
            raise RuntimeError(f"the engine cannot go on: {engine.failure}") from engine.failure
        self._process.join()
        if self._process.exitcode and self._n_signals < SIGNALS_TO_KILL:
            raise ChildProcessError(
                f"the process that serves HTTP has ended (exit code {self._process.exitcode}): what it printed before "
                "says why"
            )

    def __enter__(self) -> "HttpProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        if not self._has_served:  # it waits for what it has to know, and ends when it finds that there is none
            self._process.join(END_SECONDS)
        self._process.kill()
        self._process.join()

    @contextmanager
    def _handled_signals(self, host: EngineHost) -> Iterator[None]:
        """A block in which signals are passed on."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            self._n_signals += 1
            if self._n_signals >= SIGNALS_TO_KILL:
                self._process.kill()
            else:
                host.tell(Stop(at_once=self._n_signals > 1))

        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_http(connection: Connection, listener: socket.socket) -> None:
    """The process: serve HTTP until the other one says that it is to end, or is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_SECONDS)
    from fastllama.server import run
    from fastllama.server.service import Service

    try:
        setup: Setup = connection.recv()
    except (EOFError, OSError):  # there is no model
        return
    run.raise_descriptor_limit()
    engine = RemoteEngine(connection, setup.facts)
    service = Service(engine, setup.served, setup.settings)
    config = run.configure(service, root_path=setup.root_path, log_level=setup.log_level)
    server = run.Server(config, service, on_start=lambda: engine.tell(Listening()))
    engine.on_stop = lambda at_once: server.stop(at_once=at_once)
    engine.start()
    with closing(listener):
        server.run(sockets=[listener])
    if engine.has_lost_engine:
        sys.exit(f"fastllama serve: {GONE}")


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """A block in which Ctrl-C does nothing, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
