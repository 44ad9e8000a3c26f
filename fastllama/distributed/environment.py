"""Reads and checks the environment variables that a launcher such as torchrun sets in each of its processes.

If WORLD_SIZE is missing, empty or 1, there is one process and the other variables are ignored.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

REQUIRED_VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # if WORLD_SIZE is more than 1
LOCAL_VARIABLES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
TORCHRUN_PREFIX = "TORCHELASTIC_"  # of torchrun's other variables
WHOLE_NUMBER = re.compile("[0-9]{1,9}")
MAX_PORT = 65535
REMEDY = "start all processes with torchrun, or unset WORLD_SIZE to run one process"


@dataclass(frozen=True)
class DistributedEnvironment:
    """This process's rank, the number of processes, and the address where they connect."""

    world_size: int
    rank: int
    master_addr: str
    master_port: int
    has_torchrun_store: bool  # torchrun's agent keeps the store; otherwise rank 0 does

    @property
    def endpoint(self) -> str:
        """The address and port for messages, under the variables' names."""
        return f"MASTER_ADDR={self.master_addr}, MASTER_PORT={self.master_port}"


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """WORLD_SIZE, the number of processes; 1 if it is not set. ValueError if it is no positive number."""
    value = environ.get("WORLD_SIZE", "").strip() or "1"
    if not WHOLE_NUMBER.fullmatch(value) or int(value) < 1:
        raise ValueError(
            f"the environment variable WORLD_SIZE must be a number of processes, got {value!r:.40}: unset it"
        )
    return int(value)


def distributed_environment(environ: Mapping[str, str] = os.environ) -> DistributedEnvironment | None:
    """The launcher's variables, checked; None if there is one process.

    Raises ValueError, which names the variable, if one is missing or out of range.
    """
    size = world_size(environ)
    if size == 1:
        return None
    missing = [name for name in REQUIRED_VARIABLES if not environ.get(name, "").strip()]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        raise ValueError(f"WORLD_SIZE asks for {size} processes and {', '.join(missing)} {are} not set: {REMEDY}")
    local_world_size(environ), local_rank(environ)  # checks them before any process waits for others
    return DistributedEnvironment(
        world_size=size,
        rank=_number(environ, "RANK", 0, size - 1, f", as WORLD_SIZE is {size}"),
        master_addr=environ["MASTER_ADDR"].strip(),
        master_port=_number(environ, "MASTER_PORT", 1, MAX_PORT, ""),
        has_torchrun_store=environ.get(f"{TORCHRUN_PREFIX}USE_AGENT_STORE") == "True",
    )


def is_distributed(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether WORLD_SIZE is more than 1 and all required variables are set. ValueError as in `world_size`."""
    return world_size(environ) > 1 and all(environ.get(name, "").strip() for name in REQUIRED_VARIABLES)


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """LOCAL_RANK, this process's number on this machine; 0 if it is not set. ValueError if it is out of range."""
    size = world_size(environ)
    if size == 1 or not environ.get("LOCAL_RANK", "").strip():
        return 0
    n_local = local_world_size(environ) if environ.get("LOCAL_WORLD_SIZE", "").strip() else size
    return _number(environ, "LOCAL_RANK", 0, n_local - 1, f", as there are {n_local} processes")


def local_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """LOCAL_WORLD_SIZE, the processes on this machine; 1 if it is not set. ValueError if it is out of range."""
    size = world_size(environ)
    if size == 1 or not environ.get("LOCAL_WORLD_SIZE", "").strip():
        return 1
    return _number(environ, "LOCAL_WORLD_SIZE", 1, size, f", as WORLD_SIZE is {size}")


def single_process_environ() -> dict[str, str]:
    """The environment without the launcher's variables, for a child process that runs alone."""
    launcher_variables = (*REQUIRED_VARIABLES, *LOCAL_VARIABLES, "WORLD_SIZE")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in launcher_variables and not name.startswith(TORCHRUN_PREFIX)
    }


def _number(environ: Mapping[str, str], name: str, least: int, most: int, why: str) -> int:
    value = environ[name].strip()
    if not WHOLE_NUMBER.fullmatch(value) or not least <= int(value) <= most:
        raise ValueError(
            f"the environment variable {name} must be a number from {least} to {most}{why}, got {value!r:.40}: {REMEDY}"
        )
    return int(value)
