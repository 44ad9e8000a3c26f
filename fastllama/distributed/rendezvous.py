"""Connects the processes of a launch: a torch store, returned after all have connected to it.

Under torchrun, the agent keeps the store. Without it, a process could wait forever for others that are never started,
for example with variables left over from another launch. So each process registers with rank 0 first and waits at most
TIMEOUT_SECONDS; the error names the missing ranks. When all have registered, rank 0 acknowledges, and opens torch's
store at the same port.
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

from fastllama.distributed.environment import REMEDY, DistributedEnvironment
from fastllama.validate import first_names

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0  # for processes that start late
RESOLVE_TIMEOUT_SECONDS = 5.0  # for a host name that is not known yet
WARN_AFTER_SECONDS = 3.0
POLL_SECONDS = 0.1
CONNECT_TIMEOUT_SECONDS = 5.0
REGISTER_TIMEOUT_SECONDS = 1.0  # between connecting and registering
MAX_MESSAGE_BYTES = 4096
LOOPBACK = "127.0.0.1"


@functools.cache  # keeps rank 0's store alive, which serves the others
def connect_store(environment: DistributedEnvironment) -> Any:
    """The store that all processes of the launch have connected to.

    Raises ValueError, naming the variables, if the address cannot be used, another process has this rank, or
    processes are missing after TIMEOUT_SECONDS. It may be called again after an error.
    """
    deadline = _Deadline(environment)
    try:
        if environment.has_torchrun_store:
            _connect(environment, deadline).close()
            store, _, _ = next(rendezvous("env://"))
            return store
        _wait_until_resolvable(environment)
        if environment.rank > 0:
            _register(environment, deadline)
            return _store(environment.master_addr, environment.master_port, is_master=False)
        with contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(_listen(environment))
            _accept_all(environment, listener, deadline)
            on_error.pop_all()
            return _store(LOOPBACK, environment.master_port, is_master=True, master_listen_fd=listener.detach())
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the connection to {environment.endpoint} failed ({reason}): {REMEDY}") from error


def _store(host: str, port: int, **options: Any) -> Any:
    return dist.TCPStore(host, port, wait_for_workers=False, **options)  # type: ignore[attr-defined]


class _Deadline:
    """The time by which all processes must have connected. It logs one warning if that takes long."""

    def __init__(self, environment: DistributedEnvironment) -> None:
        self._environment = environment
        self._start = time.monotonic()
        self._has_warned = False

    @property
    def seconds_left(self) -> float:
        return self._start + TIMEOUT_SECONDS - time.monotonic()

    def warn_if_slow(self, missing: str) -> None:
        """Log once which processes are missing, after WARN_AFTER_SECONDS."""
        if not self._has_warned and time.monotonic() - self._start > WARN_AFTER_SECONDS:
            self._has_warned = True
            logger.warning(
                "RANK=%d of WORLD_SIZE=%d waits for %s at %s, for %d seconds more",
                self._environment.rank,
                self._environment.world_size,
                missing,
                self._environment.endpoint,
                max(0, self.seconds_left),
            )


def _wait_until_resolvable(environment: DistributedEnvironment) -> None:
    deadline = time.monotonic() + RESOLVE_TIMEOUT_SECONDS
    while True:
        try:
            socket.getaddrinfo(environment.master_addr, environment.master_port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline or isinstance(error, UnicodeError):
                reason = getattr(error, "strerror", None) or error
                raise ValueError(
                    f"MASTER_ADDR={environment.master_addr} is no known host ({reason}): set it to the address of the "
                    f"machine of RANK=0, or {REMEDY}"
                ) from None
        time.sleep(POLL_SECONDS)


def _listen(environment: DistributedEnvironment) -> socket.socket:
    port = environment.master_port
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        why = "another program, or another process with RANK=0, uses it" if in_use else error.strerror
        raise ValueError(f"MASTER_PORT={port} cannot be used here: {why}; set another port, or {REMEDY}") from None


def _accept_all(environment: DistributedEnvironment, listener: socket.socket, deadline: _Deadline) -> None:
    """In rank 0: wait until all other ranks have registered, then acknowledge to each."""
    size = environment.world_size
    registered: dict[int, tuple[socket.socket, str]] = {}  # by rank: the connection, and which process it is
    listener.settimeout(POLL_SECONDS)
    with contextlib.ExitStack() as connections:
        while missing := [rank for rank in range(1, size) if rank not in registered or _is_closed(registered[rank][0])]:
            missing_ranks = f"RANK={first_names(map(str, missing))}"
            if deadline.seconds_left <= 0:
                timed_out = f"{missing_ranks} of WORLD_SIZE={size} did not connect to {environment.endpoint} in "
                timed_out += f"{TIMEOUT_SECONDS:.0f} seconds: {REMEDY}"
                for connection, _ in registered.values():
                    _send(connection, {"error": timed_out})
                raise ValueError(timed_out)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                deadline.warn_if_slow(missing_ranks)
                continue
            connections.enter_context(connection)
            message: dict[str, Any] = _receive(connection, REGISTER_TIMEOUT_SECONDS) or {}
            rank = message.get("rank")
            if not isinstance(rank, int):  # another program
                connection.close()
            elif error := _rejection(environment, message, registered if rank not in missing else {}):
                _send(connection, {"error": error})
            elif rank in missing:
                registered[rank] = connection, str(message.get("process"))
        for connection, _ in registered.values():
            _send(connection, {"error": None})


def _rejection(
    environment: DistributedEnvironment, message: dict[str, Any], registered: dict[int, tuple[socket.socket, str]]
) -> str | None:
    """Why rank 0 rejects a process that registers, or None. `registered` has the live process of its rank, if any."""
    size, rank = message.get("world_size"), message.get("rank")
    if size != environment.world_size:
        return f"WORLD_SIZE={size} here, and {environment.world_size} in RANK=0, at {environment.endpoint}: {REMEDY}"
    if rank in registered:
        return (
            f"RANK={rank} is taken at {environment.endpoint} by {registered[rank][1]}: each process needs its own "
            f"RANK; {REMEDY}"
        )
    return None


def _register(environment: DistributedEnvironment, deadline: _Deadline) -> None:
    """In the other ranks: register with rank 0, and wait for its acknowledgement that all have."""
    with _connect(environment, deadline) as connection:
        process = f"process {os.getpid()} on {socket.gethostname()}"
        _send(connection, {"rank": environment.rank, "world_size": environment.world_size, "process": process})
        answer = None
        # Waits a little longer than rank 0 does, so that rank 0 can send its error.
        while answer is None and deadline.seconds_left > -REGISTER_TIMEOUT_SECONDS:
            answer = _receive(connection, POLL_SECONDS)
            deadline.warn_if_slow("others")
    if answer is None or "error" not in answer:
        raise ValueError(
            f"RANK={environment.rank} expects RANK=0 of this launch at {environment.endpoint}, and what listens "
            f"there is not it: set another port, or {REMEDY}"
        )
    if answer["error"] is not None:
        raise ValueError(answer["error"])


def _connect(environment: DistributedEnvironment, deadline: _Deadline) -> socket.socket:
    """A connection to the master address, once something listens there."""
    expected = "torchrun" if environment.has_torchrun_store else "RANK=0"
    while True:
        try:
            seconds = min(CONNECT_TIMEOUT_SECONDS, max(POLL_SECONDS, deadline.seconds_left))
            return socket.create_connection((environment.master_addr, environment.master_port), seconds)
        except OSError as error:
            if deadline.seconds_left <= 0:
                raise ValueError(
                    f"RANK={environment.rank} of WORLD_SIZE={environment.world_size} cannot connect to {expected} at "
                    f"{environment.endpoint} in {TIMEOUT_SECONDS:.0f} seconds ({error.strerror or error}): {REMEDY}"
                ) from None
        deadline.warn_if_slow(expected)
        time.sleep(POLL_SECONDS)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a closed connection is noticed when its rank is checked next
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """The next message; None if none arrives within `seconds`, {} if it is not from one of our processes."""
    connection.settimeout(seconds)
    line = b""
    try:
        while not line.endswith(b"\n"):
            received = connection.recv(MAX_MESSAGE_BYTES)
            line += received
            if not received or len(line) > MAX_MESSAGE_BYTES:
                return {}
        message = json.loads(line)
    except TimeoutError:
        return None
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)
