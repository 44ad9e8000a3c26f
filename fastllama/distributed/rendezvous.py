"""Where the processes of a launch find each other: a store that every one of them has reached.

torchrun's agent has everybody together before it starts anybody. Without it a process may wait for others that never
come, with an environment that is left over from another launch. So it waits only so long, and says for whom: all
greet the first one, which lets them go on when all are there. Only then comes torch's store, at the same port.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import socket
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fastllama.distributed.environment import REMEDY, Launch
from fastllama.validate import first_names

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 30.0  # for processes that start late
RESOLVING_SECONDS = 5.0  # for a name that is not known yet
WORD_SECONDS = 3.0  # until it is said what is waited for
POLL_SECONDS = 0.1
CONNECT_SECONDS = 5.0
GREETING_SECONDS = 1.0  # for one that has connected to say who it is
LONGEST_LINE = 4096
HERE = "127.0.0.1"


@functools.cache  # the first process keeps the store, as long as it lives
def meet(launch: Launch) -> Any:
    """The store where all processes of the launch have come.

    Raises ValueError, naming the variables, where this is no place to meet, where somebody has come as this process
    already, and where others do not come. The next call may be with another launch, or the same.
    """
    waiting = _Waiting(launch)
    try:
        if launch.has_agent:
            _connected(launch, waiting).close()
            store, _, _ = next(rendezvous("env://"))
            return store
        _resolve(launch)
        if launch.rank > 0:
            _join(launch, waiting)
            return _store(launch.address, launch.port, is_master=False)
        with contextlib.ExitStack() as unless_met:
            listening = unless_met.enter_context(_listen(launch))
            _gather(launch, listening, waiting)
            unless_met.pop_all()
            return _store(HERE, launch.port, is_master=True, master_listen_fd=listening.detach())
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the connection to {launch.place} failed ({reason}): {REMEDY}") from error


def _store(host: str, port: int, **how: Any) -> Any:
    return dist.TCPStore(host, port, wait_for_workers=False, **how)  # type: ignore[attr-defined]


class _Waiting:
    """The time that a process waits for others; it says so once."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._start = time.monotonic()
        self._said = False

    @property
    def left(self) -> float:
        return self._start + PATIENCE_SECONDS - time.monotonic()

    def word(self, whom: str) -> None:
        """Say whom it waits for, if that takes long."""
        if not self._said and time.monotonic() - self._start > WORD_SECONDS:
            self._said = True
            logger.warning(
                "RANK=%d of WORLD_SIZE=%d waits for %s at %s, for %d seconds more",
                self._launch.rank,
                self._launch.world_size,
                whom,
                self._launch.place,
                max(0, self.left),
            )


def _resolve(launch: Launch) -> None:
    deadline = time.monotonic() + RESOLVING_SECONDS
    while True:
        try:
            socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline or isinstance(error, UnicodeError):
                reason = getattr(error, "strerror", None) or error
                raise ValueError(
                    f"no machine is known by MASTER_ADDR={launch.address} ({reason}): set it to the address of the "
                    f"machine of RANK=0, or {REMEDY}"
                ) from None
        time.sleep(POLL_SECONDS)


def _listen(launch: Launch) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", launch.port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", launch.port))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "another program, or another process with RANK=0, has it" if taken else error.strerror
        raise ValueError(
            f"MASTER_PORT={launch.port} cannot be used here: {why}; set another port, or {REMEDY}"
        ) from None


def _gather(launch: Launch, listening: socket.socket, waiting: _Waiting) -> None:
    """In the first process: until all others have come."""
    come: dict[int, tuple[socket.socket, str]] = {}
    listening.settimeout(POLL_SECONDS)
    with contextlib.ExitStack() as connections:
        while missing := [rank for rank in range(1, launch.world_size) if rank not in come or _gone(come[rank][0])]:
            whom = f"RANK={first_names(map(str, missing))}"
            if waiting.left <= 0:
                message = f"{whom} of WORLD_SIZE={launch.world_size} did not come to {launch.place} in "
                message += f"{PATIENCE_SECONDS:.0f} seconds: {REMEDY}"
                for connection, _ in come.values():
                    _say(connection, {"error": message})
                raise ValueError(message)
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                waiting.word(whom)
                continue
            connections.enter_context(connection)
            greeting: dict[str, Any] = _hear(connection, GREETING_SECONDS) or {}
            rank = greeting.get("rank")
            if not isinstance(rank, int):  # nobody of ours
                connection.close()
            elif error := _refusal(launch, greeting, come if rank not in missing else {}):
                _say(connection, {"error": error})
            elif rank in missing:
                come[rank] = connection, str(greeting.get("who"))
        for connection, _ in come.values():
            _say(connection, {"error": None})


def _refusal(launch: Launch, greeting: dict[str, Any], come: dict[int, tuple[socket.socket, str]]) -> str | None:
    """Why the first process does not let another take part, if it does not; `come` are those in its place."""
    size, rank = greeting.get("world_size"), greeting.get("rank")
    if size != launch.world_size:
        return f"WORLD_SIZE={size} here, and {launch.world_size} in RANK=0, at {launch.place}: {REMEDY}"
    if rank in come:
        return (
            f"RANK={rank} has come to {launch.place} already, {come[rank][1]}: each needs a RANK of its own; {REMEDY}"
        )
    return None


def _join(launch: Launch, waiting: _Waiting) -> None:
    """In the others: greet the first, and wait for it to say that all are there."""
    with _connected(launch, waiting) as connection:
        who = f"process {os.getpid()} on {socket.gethostname()}"
        _say(connection, {"rank": launch.rank, "world_size": launch.world_size, "who": who})
        answer = None
        while answer is None and waiting.left > -GREETING_SECONDS:  # the first is to say why
            answer = _hear(connection, POLL_SECONDS)
            waiting.word("others")
    if answer is None or "error" not in answer:
        raise ValueError(
            f"what listens at {launch.place} is not RANK=0 of this launch, waiting for RANK={launch.rank}: set another "
            f"port, or {REMEDY}"
        )
    if answer["error"] is not None:
        raise ValueError(answer["error"])


def _connected(launch: Launch, waiting: _Waiting) -> socket.socket:
    """A connection to the meeting point, once somebody listens there."""
    whom = "torchrun" if launch.has_agent else "RANK=0"
    while True:
        try:
            seconds = min(CONNECT_SECONDS, max(POLL_SECONDS, waiting.left))
            return socket.create_connection((launch.address, launch.port), seconds)
        except OSError as error:
            if waiting.left <= 0:
                raise ValueError(
                    f"RANK={launch.rank} of WORLD_SIZE={launch.world_size} finds nobody at {launch.place}, where "
                    f"{whom} should be, in {PATIENCE_SECONDS:.0f} seconds ({error.strerror or error}): {REMEDY}"
                ) from None
        waiting.word(whom)
        time.sleep(POLL_SECONDS)


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # one that has gone is missed soon
        connection.sendall(json.dumps(message).encode() + b"\n")


def _hear(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """What the other says within so many seconds; nothing of what no process of ours would say, or None."""
    connection.settimeout(seconds)
    line = b""
    try:
        while not line.endswith(b"\n"):
            got = connection.recv(LONGEST_LINE)
            line += got
            if not got or len(line) > LONGEST_LINE:
                return {}
        found = json.loads(line)
    except TimeoutError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)
