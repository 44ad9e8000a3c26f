"""Connecting the processes of a launch, and the errors if some are missing. Each process is a thread here."""

import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from fastllama.distributed import rendezvous
from fastllama.distributed.environment import REMEDY, DistributedEnvironment
from fastllama.distributed.rendezvous import connect_store

SHORT_SECONDS = 0.2  # for processes that never come
HOST = "127.0.0.1"


@pytest.fixture
def port() -> int:
    """A free port."""
    with socket.create_server((HOST, 0)) as server:
        number: int = server.getsockname()[1]
    return number


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool
    connect_store.cache_clear()


def environment_of(size: int, rank: int, port: int, address: str = HOST) -> DistributedEnvironment:
    return DistributedEnvironment(size, rank, address, port, has_torchrun_store=False)


def error_of(future: "Future[Any]") -> str:
    with pytest.raises(ValueError) as caught:
        future.result()
    return str(caught.value)


def test_all_processes_connect_in_any_order(port: int, threads: ThreadPoolExecutor) -> None:
    stores = [threads.submit(connect_store, environment_of(3, rank, port)) for rank in (2, 0, 1)]
    third, first, second = (PrefixStore("test", store.result()) for store in stores)
    first.set("key", "value")
    assert second.get("key") == third.get("key") == b"value"
    assert connect_store(environment_of(3, 0, port)) is stores[1].result()


def test_missing_ranks_are_named_and_the_next_call_works(
    port: int, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "WARN_AFTER_SECONDS", 0)
    with monkeypatch.context() as short:
        short.setattr(rendezvous, "TIMEOUT_SECONDS", 1)
        with caplog.at_level(logging.WARNING, logger="fastllama.distributed.rendezvous"):
            error = error_of(threads.submit(connect_store, environment_of(3, 0, port)))
    endpoint = f"MASTER_ADDR={HOST}, MASTER_PORT={port}"
    assert error == f"RANK=1, 2 of WORLD_SIZE=3 did not connect to {endpoint} in 1 seconds: {REMEDY}"
    (warning,) = caplog.messages
    assert re.fullmatch(f"RANK=0 of WORLD_SIZE=3 waits for RANK=1, 2 at {endpoint}, for \\d seconds more", warning)
    stores = [threads.submit(connect_store, environment_of(2, rank, port)) for rank in (0, 1)]
    assert all(store.result() for store in stores)


def test_an_address_where_nothing_listens_is_an_error(
    port: int, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "TIMEOUT_SECONDS", SHORT_SECONDS)
    assert error_of(threads.submit(connect_store, environment_of(2, 1, port))) == (
        f"RANK=1 of WORLD_SIZE=2 cannot connect to RANK=0 at MASTER_ADDR={HOST}, MASTER_PORT={port} in 0 seconds "
        f"(Connection refused): {REMEDY}"
    )
    left_over = DistributedEnvironment(2, 0, HOST, port, has_torchrun_store=True)
    assert "cannot connect to torchrun" in error_of(threads.submit(connect_store, left_over))


def test_a_port_in_use_is_named(threads: ThreadPoolExecutor) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        error = error_of(threads.submit(connect_store, environment_of(2, 0, port)))
    assert error == (
        f"MASTER_PORT={port} cannot be used here: another program, or another process with RANK=0, uses it; set "
        f"another port, or {REMEDY}"
    )


def test_an_unknown_host_is_named(threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any, **keywords: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(rendezvous, "RESOLVE_TIMEOUT_SECONDS", SHORT_SECONDS)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for rank in (0, 1):
        assert error_of(threads.submit(connect_store, environment_of(2, rank, 1, "nowhere"))) == (
            "MASTER_ADDR=nowhere is no known host (Name or service not known): set it to the address of the "
            f"machine of RANK=0, or {REMEDY}"
        )


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad Request\r\n", b"[1]\n", b"{}\n"])
def test_another_program_at_the_address_is_an_error(
    answer: bytes, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends something else, or nothing."""
    monkeypatch.setattr(rendezvous, "TIMEOUT_SECONDS", SHORT_SECONDS)
    monkeypatch.setattr(rendezvous, "REGISTER_TIMEOUT_SECONDS", SHORT_SECONDS)
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        second = threads.submit(connect_store, environment_of(2, 1, port))
        connection, _ = other.accept()
        with connection:
            connection.sendall(answer)
            assert error_of(second) == (
                f"RANK=1 expects RANK=0 of this launch at MASTER_ADDR={HOST}, MASTER_PORT={port}, and what listens "
                f"there is not it: set another port, or {REMEDY}"
            )


def test_processes_of_other_launches_are_rejected_and_the_others_connect(
    port: int, threads: ThreadPoolExecutor
) -> None:
    """A rank given twice, another world size, other programs, and a process that disconnects."""
    first = threads.submit(connect_store, environment_of(3, 0, port))
    for sent in (b"GET / HTTP/1.0\r\n", b'{"rank": "x"}\n', b'{"rank": 2, "world_size": 3, "process": "gone"}\n'):
        with connected(port) as other:
            other.sendall(sent)
    larger = threads.submit(connect_store, environment_of(4, 2, port))
    endpoint = f"MASTER_ADDR={HOST}, MASTER_PORT={port}"
    assert error_of(larger) == f"WORLD_SIZE=4 here, and 3 in RANK=0, at {endpoint}: {REMEDY}"
    same_rank = [threads.submit(connect_store, environment_of(3, 1, port)) for _ in range(2)]
    while not any(future.done() for future in same_rank):
        time.sleep(0.01)
    rejected, accepted = sorted(same_rank, key=lambda future: not future.done())
    assert re.fullmatch(
        f"RANK=1 is taken at {endpoint} by process \\d+ on .*: each process needs its own RANK; {REMEDY}",
        error_of(rejected),
    )
    third = threads.submit(connect_store, environment_of(3, 2, port))
    assert all(future.result() for future in (first, accepted, third))


def connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((HOST, port))
        except ConnectionRefusedError:
            time.sleep(0.01)
