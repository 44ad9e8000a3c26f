"""Runs the server until it is told to stop: SIGTERM or Ctrl-C once to end in order, twice to end at once."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from fastllama.server.app import create_app
from fastllama.server.service import Service

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 60  # of a connection without requests; clients keep them for less
CLOSE_SECONDS = 5  # for connections to end after the last answer
BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn, which goes on answering, with 503, while answers end."""

    def __init__(self, config: uvicorn.Config, service: Service, on_start: Callable[[], None] | None = None) -> None:
        """on_start: called once it listens, and signals are handled."""
        super().__init__(config)
        self._on_start = on_start
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None  # of the engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops in order, the next at once."""
        if self._loop is None or self._stopping is not None:
            self.force_exit = self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._begin_to_stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and to watch the engine."""
        self._loop = asyncio.get_running_loop()
        self._watching = asyncio.create_task(self._watch_engine())
        await super().startup(sockets)
        if self._on_start is not None:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections."""
        self._watching.cancel()
        await super().shutdown(sockets)

    def _begin_to_stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        await self._service.drain()
        self.should_exit = True

    async def _watch_engine(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self.failure = self._service.engine.failure
            if self.failure is not None:
                self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address that does not listen yet. Raises OSError, which names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {host}, port {port} ({error.strerror or error})") from error
    return bound


def configure(service: Service, *, root_path: str = "", log_level: str = "warning") -> uvicorn.Config:
    """uvicorn's configuration for a service."""
    return uvicorn.Config(
        create_app(service),
        root_path=root_path,
        backlog=BACKLOG,
        log_level=log_level,
        access_log=log_level == "info",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        server_header=False,
        lifespan="off",
        http="h11",  # which reads the body of a request that offers HTTP/2
        ws="none",
    )


def serve(
    service: Service,
    listener: socket.socket,
    *,
    root_path: str = "",
    log_level: str = "warning",
    on_start: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal. Raises RuntimeError with the reason if the engine cannot go on.

    on_start: called once it listens, and signals are handled.
    """
    server = Server(configure(service, root_path=root_path, log_level=log_level), service, on_start)
    with contextlib.closing(listener):
        server.run(sockets=[listener])
    if server.failure is not None:
        raise RuntimeError(f"the engine cannot go on: {server.failure}") from server.failure
