"""Where processes find each other, and how long they wait: each a thread of this process."""

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
from fastllama.distributed.environment import REMEDY, Launch
from fastllama.distributed.rendezvous import meet

SHORT_SECONDS = 0.2  # for who never comes
HOST = "127.0.0.1"


@pytest.fixture
def port() -> int:
    """One that is free."""
    with socket.create_server((HOST, 0)) as found:
        number: int = found.getsockname()[1]
    return number


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool
    meet.cache_clear()


def one_of(size: int, rank: int, port: int, address: str = HOST) -> Launch:
    return Launch(size, rank, address, port, has_agent=False)


def refused(future: "Future[Any]") -> str:
    with pytest.raises(ValueError) as caught:
        future.result()
    return str(caught.value)


def test_all_meet_whoever_comes_first(port: int, threads: ThreadPoolExecutor) -> None:
    come = [threads.submit(meet, one_of(3, rank, port)) for rank in (2, 0, 1)]
    third, first, second = (PrefixStore("test", one.result()) for one in come)
    first.set("key", "value")
    assert second.get("key") == third.get("key") == b"value"
    assert meet(one_of(3, 0, port)) is come[1].result()


def test_those_who_do_not_come_are_named_and_the_next_meeting_is_well(
    port: int, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "WORD_SECONDS", 0)
    with monkeypatch.context() as impatient:
        impatient.setattr(rendezvous, "PATIENCE_SECONDS", 1)
        with caplog.at_level(logging.WARNING, logger="fastllama.distributed.rendezvous"):
            error = refused(threads.submit(meet, one_of(3, 0, port)))
    place = f"MASTER_ADDR={HOST}, MASTER_PORT={port}"
    assert error == f"RANK=1, 2 of WORLD_SIZE=3 did not come to {place} in 1 seconds: {REMEDY}"
    (said,) = caplog.messages
    assert re.fullmatch(f"RANK=0 of WORLD_SIZE=3 waits for RANK=1, 2 at {place}, for \\d seconds more", said)
    come = [threads.submit(meet, one_of(2, rank, port)) for rank in (0, 1)]
    assert all(one.result() for one in come)


def test_nobody_at_the_place_is_an_error(
    port: int, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", SHORT_SECONDS)
    message = f"RANK=1 of WORLD_SIZE=2 finds nobody at MASTER_ADDR={HOST}, MASTER_PORT={port}, where RANK=0 should be, "
    said = refused(threads.submit(meet, one_of(2, 1, port)))
    assert said == f"{message}in 0 seconds (Connection refused): {REMEDY}"
    left_over = Launch(2, 0, HOST, port, has_agent=True)
    assert "where torchrun should be" in refused(threads.submit(meet, left_over))


def test_a_port_that_is_taken_is_named(threads: ThreadPoolExecutor) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        said = refused(threads.submit(meet, one_of(2, 0, port)))
    assert said == (
        f"MASTER_PORT={port} cannot be used here: another program, or another process with RANK=0, has it; set another "
        f"port, or {REMEDY}"
    )


def test_a_place_of_no_machine_is_named(threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*where: Any, **how: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(rendezvous, "RESOLVING_SECONDS", SHORT_SECONDS)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for rank in (0, 1):
        assert refused(threads.submit(meet, one_of(2, rank, 1, "nowhere"))) == (
            "no machine is known by MASTER_ADDR=nowhere (Name or service not known): set it to the address of the "
            f"machine of RANK=0, or {REMEDY}"
        )


@pytest.mark.parametrize("says", [b"", b"HTTP/1.0 400 Bad Request\r\n", b"[1]\n", b"{}\n"])
def test_another_program_at_the_place_is_no_first_process(
    says: bytes, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that says something else, or nothing."""
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", SHORT_SECONDS)
    monkeypatch.setattr(rendezvous, "GREETING_SECONDS", SHORT_SECONDS)
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        second = threads.submit(meet, one_of(2, 1, port))
        connection, _ = other.accept()
        with connection:
            connection.sendall(says)
            assert refused(second) == (
                f"what listens at MASTER_ADDR={HOST}, MASTER_PORT={port} is not RANK=0 of this launch, waiting for "
                f"RANK=1: set another port, or {REMEDY}"
            )


def test_who_does_not_belong_is_sent_away_and_the_others_meet(port: int, threads: ThreadPoolExecutor) -> None:
    """A rank that two have, a world of another size, somebody who talks of something else or leaves again."""
    first = threads.submit(meet, one_of(3, 0, port))
    for says in (b"GET / HTTP/1.0\r\n", b'{"rank": "x"}\n', b'{"rank": 2, "world_size": 3, "who": "gone"}\n'):
        with connected(port) as stranger:
            stranger.sendall(says)
    larger = threads.submit(meet, one_of(4, 2, port))
    place = f"MASTER_ADDR={HOST}, MASTER_PORT={port}"
    assert refused(larger) == f"WORLD_SIZE=4 here, and 3 in RANK=0, at {place}: {REMEDY}"
    twins = [threads.submit(meet, one_of(3, 1, port)) for _ in range(2)]
    while not any(twin.done() for twin in twins):
        time.sleep(0.01)
    refused_one, welcome = sorted(twins, key=lambda twin: not twin.done())
    assert re.fullmatch(
        f"RANK=1 has come to {place} already, process \\d+ on .*: each needs a RANK of its own; {REMEDY}",
        refused(refused_one),
    )
    third = threads.submit(meet, one_of(3, 2, port))
    assert all(one.result() for one in (first, welcome, third))


def connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((HOST, port))
        except ConnectionRefusedError:
            time.sleep(0.01)
