"""Runs the server in a thread of the test's own process, on a free port.

The engine is at the other end of a connection, as it is in another process, but in this one.

with running_server(llm, ServerSettings(max_queue=0)) as server:
    httpx.get(f"{server.url}/health")
    assert server.engine.stats.used_pages == 0
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastllama import Llama
from fastllama.engine import Engine
from fastllama.engine.engine_host import EngineHost
from fastllama.openai_api.envelope import ServedModel
from fastllama.server import run
from fastllama.server.connection import Config
from fastllama.server.fingerprint import fingerprint
from fastllama.server.service import Service
from fastllama.server.settings import ServerSettings
from tests.support.remote_engines import connected
from tests.support.timeouts import HANG_SECONDS, wait_until

HOST = "127.0.0.1"
MODEL = "served"  # the model's name


@dataclass(frozen=True)
class RunningServer:
    """A server that listens."""

    url: str
    service: Service
    server: run.Server
    engine: Engine
    host: EngineHost

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    @property
    def is_idle(self) -> bool:
        """Whether it holds nothing for any request."""
        stats = self.engine.stats
        return not (self.service.n_open or stats.running or stats.waiting or stats.used_pages)

    def wait_until_idle(self) -> None:
        """Wait until nothing is left of any request: what a client has left behind ends soon after."""
        wait_until(lambda: self.is_idle)

    @contextlib.contextmanager
    def paused(self, after_steps: int = 0) -> Iterator[None]:
        """A block in which the engine runs so many steps and then waits.

        Requests can be submitted. One that is cancelled ends after the block, at the next step.
        """
        engine, step = self.engine, self.engine.step
        ended, left = threading.Event(), iter(range(after_steps))

        def gated_step() -> bool:
            if next(left, None) is None:
                ended.wait(HANG_SECONDS)
            return step()

        engine.step = gated_step  # type: ignore[method-assign]
        try:
            yield
        finally:
            del engine.step
            ended.set()


class _ServerInThread(run.Server):
    """Tells when it listens, or when it has failed to."""

    def __init__(self, config: Config, service: Service) -> None:
        super().__init__(config, service)
        self.error: BaseException | None = None
        self.has_begun = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell."""
        await super().startup(sockets)
        self.has_begun.set()

    def run_and_keep_error(self, listener: socket.socket) -> None:
        """The thread's function."""
        try:
            self.run(sockets=[listener])
        except BaseException as error:
            self.error = error
        finally:
            self.has_begun.set()


@contextlib.contextmanager
def running_server(
    llm: Llama,
    settings: ServerSettings | None = None,
    *,
    name: str = MODEL,
    root_path: str = "",
    **engine_options: Any,
) -> Iterator[RunningServer]:
    """A server for the block, on an engine of its own. At the end it stops in order, as after SIGTERM.

    engine_options: of `Llama.engine`. Fails if the server raises or does not end.
    """
    with (
        llm.engine(**engine_options) as engine,
        contextlib.closing(run.bind(HOST, 0)) as listener,
        connected(engine.start()) as (host, remote),
    ):
        service = Service(remote, ServedModel(name, llm.tokenizer, fingerprint(llm)), settings or ServerSettings())
        server = _ServerInThread(run.configure(service, root_path=root_path), service)
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run_and_keep_error, args=(listener,), name="server", daemon=True)
        thread.start()
        try:
            assert server.has_begun.wait(HANG_SECONDS), "the server does not listen"
            if server.error is None:
                yield RunningServer(url, service, server, engine, host)
        finally:
            server.stop(at_once=False)
            thread.join(HANG_SECONDS)
        assert not thread.is_alive(), "the server's thread does not end"
        if server.error is not None:
            raise server.error
