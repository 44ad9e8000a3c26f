"""An engine at the other end of a connection, as it is in another process, but in the test's own."""

import contextlib
import os
import socket
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

from fastllama.engine import Engine
from fastllama.engine.engine_host import EngineHost
from fastllama.engine.facts import Facts
from fastllama.engine.remote_engine import RemoteEngine


class Ends(NamedTuple):
    """The two ends of a connection."""

    host: EngineHost
    remote: RemoteEngine


@contextlib.contextmanager
def connected(engine: Engine) -> Iterator[Ends]:
    """An engine's host, and who submits requests to it, for the block. What they say is pickled."""
    ours, theirs = Pipe()
    host = EngineHost(engine, ours).start()
    try:
        yield Ends(host, RemoteEngine(theirs, Facts.of(engine.llm)).start())
    finally:
        for end in (ours, theirs):
            hang_up(end)
        host.join()


def hang_up(end: Connection) -> None:
    """End a connection, as if the process at this end were gone, though threads read from it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(end.fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)
