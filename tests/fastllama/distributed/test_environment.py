"""What a launcher's variables may hold, and what is said of those that cannot be right."""

import re

import pytest

from fastllama.distributed import environment
from fastllama.distributed.environment import Launch

TWO = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "first-machine", "MASTER_PORT": "29500"}
REMEDY = "start all processes with torchrun, or unset WORLD_SIZE where there is one"
LEFT_OVER = {"RANK": "7", "LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "-1", "MASTER_ADDR": "", "MASTER_PORT": "port"}


@pytest.mark.parametrize("size", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": " "}, {"WORLD_SIZE": "1"}])
def test_one_process_looks_at_nothing_else(size: dict[str, str]) -> None:
    environ = LEFT_OVER | size
    assert environment.world_size(environ) == environment.local_world_size(environ) == 1
    assert environment.several(environ) is None and not environment.torchrun_started(environ)
    assert environment.local_rank(environ) == 0


def test_several_processes_are_told_who_they_are() -> None:
    assert environment.several(TWO) == Launch(2, 1, "first-machine", 29500, has_agent=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert environment.several(TWO | agent) == Launch(2, 1, "first-machine", 29500, has_agent=True)
    assert (
        environment.torchrun_started(TWO)
        and environment.local_rank(TWO) == 0
        and environment.local_world_size(TWO) == 1
    )
    assert environment.local_rank(TWO | agent) == 1 and environment.local_world_size(TWO | agent) == 2


@pytest.mark.parametrize("value", ["two", "0", "-2", "1.5", "2 2", "²", "9" * 5000])
def test_a_world_that_is_no_number_is_named(value: str) -> None:
    shown = f"{value!r:.40}"
    message = f"the environment variable WORLD_SIZE must be a number of processes, got {shown}: unset it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        environment.several({"WORLD_SIZE": value})


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (("RANK",), "RANK is"),
        (("MASTER_PORT",), "MASTER_PORT is"),
        (("RANK", "MASTER_ADDR", "MASTER_PORT"), "RANK, MASTER_ADDR, MASTER_PORT are"),
    ],
)
def test_what_is_not_set_is_named(gone: tuple[str, ...], said: str) -> None:
    message = f"^WORLD_SIZE asks for 2 processes and {said} not set: {REMEDY}$"
    without = {name: value for name, value in TWO.items() if name not in gone}
    for environ in (without, TWO | dict.fromkeys(gone, "")):
        with pytest.raises(ValueError, match=message):
            environment.several(environ)
        assert not environment.torchrun_started(environ)


@pytest.mark.parametrize(
    ("name", "value", "range_of_it"),
    [
        ("RANK", "7", "0 to 1, as WORLD_SIZE is 2"),
        ("RANK", "2", "0 to 1, as WORLD_SIZE is 2"),
        ("RANK", "-1", "0 to 1, as WORLD_SIZE is 2"),
        ("RANK", "one", "0 to 1, as WORLD_SIZE is 2"),
        ("MASTER_PORT", "0", "1 to 65535"),
        ("MASTER_PORT", "65536", "1 to 65535"),
        ("MASTER_PORT", "port", "1 to 65535"),
        ("LOCAL_RANK", "x", "0 to 1, as there are 2 processes"),
        ("LOCAL_RANK", "-1", "0 to 1, as there are 2 processes"),
        ("LOCAL_RANK", "2", "0 to 1, as there are 2 processes"),
        ("LOCAL_WORLD_SIZE", "0", "1 to 2, as WORLD_SIZE is 2"),
        ("LOCAL_WORLD_SIZE", "3", "1 to 2, as WORLD_SIZE is 2"),
    ],
)
def test_a_number_out_of_range_is_named(name: str, value: str, range_of_it: str) -> None:
    with pytest.raises(ValueError, match=f"the environment variable {name} must be"):
        environment.several(TWO | {name: value})  # before anybody waits for others
    reads = {"LOCAL_RANK": environment.local_rank, "LOCAL_WORLD_SIZE": environment.local_world_size}
    message = f"the environment variable {name} must be a number from {range_of_it}, got '{value}': {REMEDY}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        reads.get(name, environment.several)(TWO | {name: value})


def test_a_local_rank_is_one_of_the_machines() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK must be a number from 0 to 0, as there are 1 processes, got '1'"):
        environment.local_rank(TWO | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"})
