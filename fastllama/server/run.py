"""Runs the server until it is told to stop: once to end in order, twice to end at once."""

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator

import uvicorn

from fastllama.server.app import create_app
from fastllama.server.connection import Config, Connection
from fastllama.server.service import Service

try:
    import resource
except ImportError:  # Windows, where nothing limits the number of descriptors
    resource = None  # type: ignore[assignment]

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 60  # of a connection without requests; clients keep them for less
CLOSE_SECONDS = 5  # for connections to end after the last answer
ABORT_SECONDS = 5  # for requests to end after their connections
BACKLOG = 2048
IDLE_CONNECTIONS = 1024  # more than requests in work
SPARE_DESCRIPTORS = 32  # for files that are opened later


class Server(uvicorn.Server):
    """uvicorn, which goes on answering, with 503, while answers end. It leaves signals to the engine's process."""

    config: Config

    def __init__(self, config: Config, service: Service, on_start: Callable[[], None] | None = None) -> None:
        """on_start: called once it listens."""
        super().__init__(config)
        self._on_start = on_start
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None

    def stop(self, *, at_once: bool) -> None:
        """End, in order or at once. From any thread."""
        if self._loop is None or at_once:
            self.force_exit = self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._abort_connections if at_once else self._begin_to_stop)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A block in which uvicorn handles signals: here it handles none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and to watch the engine and the connections."""
        self._loop = asyncio.get_running_loop()
        self._watching = asyncio.create_task(self._watch())
        await super().startup(sockets)
        if self._on_start is not None:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections: after a time those, too, whose answer has not been sent."""
        self._watching.cancel()
        closing = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._abort_connections)
        await super().shutdown(sockets)
        closing.cancel()

    def _begin_to_stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        await self._service.drain()
        self.should_exit = True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for connection in self._connections():
                connection.check(time.monotonic())
            if self._service.engine.failure is not None:
                self.should_exit = True

    def _connections(self) -> list[Connection]:
        return [one for one in self.server_state.connections if isinstance(one, Connection)]

    def _abort_connections(self) -> None:
        for connection in self._connections():
            connection.abort()


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


def configure(service: Service, *, root_path: str = "", log_level: str = "warning") -> Config:
    """uvicorn's configuration for a service."""
    return Config(
        create_app(service),
        service.settings,
        min(service.settings.max_connections + IDLE_CONNECTIONS, _free_descriptors()),
        root_path=root_path,
        backlog=BACKLOG,
        log_level=log_level,
        access_log=log_level == "info",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS + ABORT_SECONDS,
        server_header=False,
        lifespan="off",
        ws="none",
    )


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors, and so connections, as the system allows it."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # some systems have a limit that they do not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _free_descriptors() -> int:
    """How many connections this process has descriptors for, at least one."""
    if resource is None:
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, limit - len(os.listdir("/dev/fd")) - SPARE_DESCRIPTORS)
