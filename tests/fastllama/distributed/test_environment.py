"""A launcher's environment variables: valid values, and the errors for invalid ones."""

import re
from dataclasses import replace

import pytest

from fastllama.distributed import environment
from fastllama.distributed.environment import REMEDY, DistributedEnvironment

TWO = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "first-machine", "MASTER_PORT": "29500"}
LEFT_OVER = {"RANK": "7", "LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "-1", "MASTER_ADDR": "", "MASTER_PORT": "port"}


@pytest.mark.parametrize("size", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": " "}, {"WORLD_SIZE": "1"}])
def test_one_process_ignores_the_other_variables(size: dict[str, str]) -> None:
    environ = LEFT_OVER | size
    assert environment.world_size(environ) == environment.local_world_size(environ) == 1
    assert environment.distributed_environment(environ) is None and not environment.is_distributed(environ)
    assert environment.local_rank(environ) == 0


def test_variables_of_several_processes_are_read() -> None:
    own_launcher = DistributedEnvironment(2, 1, "first-machine", 29500, has_torchrun_store=False)
    assert environment.distributed_environment(TWO) == own_launcher and environment.is_distributed(TWO)
    assert environment.local_rank(TWO) == 0 and environment.local_world_size(TWO) == 1
    torchrun = TWO | {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert environment.distributed_environment(torchrun) == replace(own_launcher, has_torchrun_store=True)
    assert environment.local_rank(torchrun) == 1 and environment.local_world_size(torchrun) == 2


@pytest.mark.parametrize("value", ["two", "0", "-2", "1.5", "2 2", "²", "9" * 5000])
def test_an_invalid_world_size_is_an_error(value: str) -> None:
    shown = f"{value!r:.40}"
    message = f"the environment variable WORLD_SIZE must be a number of processes, got {shown}: unset it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        environment.distributed_environment({"WORLD_SIZE": value})


@pytest.mark.parametrize(
    ("unset", "text"),
    [
        (("RANK",), "RANK is"),
        (("MASTER_PORT",), "MASTER_PORT is"),
        (("RANK", "MASTER_ADDR", "MASTER_PORT"), "RANK, MASTER_ADDR, MASTER_PORT are"),
    ],
)
def test_variables_that_are_not_set_are_named(unset: tuple[str, ...], text: str) -> None:
    message = f"^WORLD_SIZE asks for 2 processes and {text} not set: {REMEDY}$"
    without = {name: value for name, value in TWO.items() if name not in unset}
    for environ in (without, TWO | dict.fromkeys(unset, "")):
        with pytest.raises(ValueError, match=message):
            environment.distributed_environment(environ)
        assert not environment.is_distributed(environ)


@pytest.mark.parametrize(
    ("name", "value", "valid"),
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
def test_a_number_out_of_range_is_named(name: str, value: str, valid: str) -> None:
    with pytest.raises(ValueError, match=f"the environment variable {name} must be"):
        environment.distributed_environment(TWO | {name: value})  # before the process waits for others
    reads = {"LOCAL_RANK": environment.local_rank, "LOCAL_WORLD_SIZE": environment.local_world_size}
    message = f"the environment variable {name} must be a number from {valid}, got '{value}': {REMEDY}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        reads.get(name, environment.distributed_environment)(TWO | {name: value})


def test_local_rank_is_below_local_world_size() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK must be a number from 0 to 0, as there are 1 processes, got '1'"):
        environment.local_rank(TWO | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"})
