"""What a launcher of several processes, such as torchrun, tells each of them in its environment, checked.

Where WORLD_SIZE is missing, empty or 1 there is one process, and whatever else is left over there is not looked at.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

TOLD = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE, to every process of several
LOCAL_VARIABLES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
TORCHRUNS_PREFIX = "TORCHELASTIC_"  # of what else torchrun tells
WHOLE_NUMBER = re.compile("[0-9]{1,9}")
LAST_PORT = 65535
REMEDY = "start all processes with torchrun, or unset WORLD_SIZE where there is one"


@dataclass(frozen=True)
class Launch:
    """One of several processes, and where they find each other."""

    world_size: int
    rank: int
    address: str
    port: int
    has_agent: bool  # torchrun's, which watches over them all, and lets them meet

    @property
    def place(self) -> str:
        """Where they find each other, by the names of the variables."""
        return f"MASTER_ADDR={self.address}, MASTER_PORT={self.port}"


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """The number of processes, 1 where nobody says one. ValueError where WORLD_SIZE is no such number."""
    value = environ.get("WORLD_SIZE", "").strip() or "1"
    if not WHOLE_NUMBER.fullmatch(value) or int(value) < 1:
        raise ValueError(
            f"the environment variable WORLD_SIZE must be a number of processes, got {value!r:.40}: unset it"
        )
    return int(value)


def several(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """What the environment tells one of several processes; None where there is one.

    Raises ValueError, which names the variable, for one that is not set or cannot be right.
    """
    size = world_size(environ)
    if size == 1:
        return None
    missing = [name for name in TOLD if not environ.get(name, "").strip()]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        raise ValueError(f"WORLD_SIZE asks for {size} processes and {', '.join(missing)} {are} not set: {REMEDY}")
    local_world_size(environ), local_rank(environ)  # so that they are refused before anybody waits for others
    return Launch(
        world_size=size,
        rank=_number(environ, "RANK", 0, size - 1, f", as WORLD_SIZE is {size}"),
        address=environ["MASTER_ADDR"].strip(),
        port=_number(environ, "MASTER_PORT", 1, LAST_PORT, ""),
        has_agent=environ.get(f"{TORCHRUNS_PREFIX}USE_AGENT_STORE") == "True",
    )


def torchrun_started(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is one of several processes, and told how to find the others. ValueError as in `world_size`."""
    return world_size(environ) > 1 and all(environ.get(name, "").strip() for name in TOLD)


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Which of this machine's processes this is; 0 where nobody says. ValueError where it cannot be right."""
    size = world_size(environ)
    if size == 1 or not environ.get("LOCAL_RANK", "").strip():
        return 0
    here = local_world_size(environ) if environ.get("LOCAL_WORLD_SIZE", "").strip() else size
    return _number(environ, "LOCAL_RANK", 0, here - 1, f", as there are {here} processes")


def local_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """How many of the processes are on this machine; 1 where nobody says. ValueError where it cannot be right."""
    size = world_size(environ)
    if size == 1 or not environ.get("LOCAL_WORLD_SIZE", "").strip():
        return 1
    return _number(environ, "LOCAL_WORLD_SIZE", 1, size, f", as WORLD_SIZE is {size}")


def single_process_environ() -> dict[str, str]:
    """The environment without what a launcher told: for a process that this one starts, and that shares nothing."""
    told = (*TOLD, *LOCAL_VARIABLES, "WORLD_SIZE")
    return {
        name: value for name, value in os.environ.items() if name not in told and not name.startswith(TORCHRUNS_PREFIX)
    }


def _number(environ: Mapping[str, str], name: str, least: int, most: int, why: str) -> int:
    value = environ[name].strip()
    if not WHOLE_NUMBER.fullmatch(value) or not least <= int(value) <= most:
        raise ValueError(
            f"the environment variable {name} must be a number from {least} to {most}{why}, got {value!r:.40}: {REMEDY}"
        )
    return int(value)
