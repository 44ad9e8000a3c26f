"""One client's connection: uvicorn's, with deadlines, and with a limit of how many there are.

uvicorn waits without limit for the head of a request and for a client to read its answer, and takes connections until
the process has no descriptor left. Here a connection is closed when the head of a request is not there in time, and
when its client reads nothing of an answer for too long. Beyond the limit the one that has been idle for longest makes
room for a new one. It is read by h11, which, unlike httptools, reads the body of a request that offers HTTP/2.
"""

import asyncio
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastllama.server.settings import ServerSettings


class Config(uvicorn.Config):
    """uvicorn's configuration, and what its connections may do."""

    def __init__(self, app: Any, settings: ServerSettings, most: int, **options: Any) -> None:
        """most: connections at once. options: uvicorn's."""
        super().__init__(app, http=Connection, **options)
        self.settings, self.most_connections = settings, most


class Connection(H11Protocol):
    """A connection, which its server checks every now and then."""

    config: Config

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, and make room for it."""
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        self._head_since: float | None = self._idle_since  # when the wait for the head of a request began
        self._unsent, self._sent_at = 0, self._idle_since
        if len(self.connections) > self.config.most_connections:
            idle = [one for one in self.connections if isinstance(one, Connection) and one.is_idle]
            min(idle, key=lambda one: one._idle_since).abort()  # this one is idle, too

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        if self.is_idle and self._head_since is None:
            self._head_since = time.monotonic()
        super().data_received(data)
        if not self.is_idle:
            self._head_since = None

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def resume_writing(self) -> None:
        """Go on writing: the client has read."""
        super().resume_writing()
        self._unsent = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is in work."""
        return self.cycle is None or self.cycle.response_complete

    def check(self, now: float) -> None:
        """Close the connection if its client is too slow. now: of time.monotonic."""
        settings = self.config.settings
        if self._head_since is not None and now - self._head_since > settings.head_seconds:
            self._head_since = None
            self.transport.close()
        # In these two states nothing is added to what is not sent, so it shrinks, or the client reads nothing.
        is_watched = self.flow.write_paused or self.transport.is_closing()
        unsent = self.transport.get_write_buffer_size() if is_watched else 0
        if not unsent or not self._unsent or unsent < self._unsent:
            self._unsent, self._sent_at = unsent, now
        elif now - self._sent_at > settings.send_seconds:
            self.abort()

    def abort(self) -> None:
        """Close the connection without what is not sent. Its request ends as if the client had gone away."""
        self.connections.discard(self)  # now, so that it is not counted until the loop has closed it
        self.transport.abort()
