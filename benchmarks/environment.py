"""What a result was measured on: the half of a figure that is usually missing.

A number without its machine, versions, commit and command cannot be repeated or compared, so every result file carries
all of them. Whatever cannot be found out (no GPU, no git, an installed wheel) is None rather than a guess.
"""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

COMMAND_TIMEOUT_S = 10


@dataclass(frozen=True)
class Environment:
    """Device, software and circumstances of one run; `git_dirty` is None where there is no commit to differ from."""

    date: str
    command: str
    device: str
    device_name: str
    cpu: str
    cores: int
    threads: int
    platform: str
    python: str
    torch: str
    triton: str | None
    fastllama: str | None
    cuda: str | None
    driver: str | None
    git_commit: str | None
    git_dirty: bool | None
    clocks: str | None = None  # of a GPU as the run began: its processors', its memory's


def describe_environment(device: torch.device | str) -> Environment:
    """The environment of this process, for figures measured on `device`."""
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    cpu = _cpu_model()
    commit, dirty = git_state(Path(__file__).resolve().parent)
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if on_cuda else cpu,
        cpu=cpu,
        cores=_cores(),
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        fastllama=_version("fastllama"),
        cuda=torch.version.cuda if on_cuda else None,
        driver=_run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_cuda else None,
        git_commit=commit,
        git_dirty=dirty,
        clocks=_run("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader") if on_cuda else None,
    )


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, whether the work tree differs) of the repository that tracks the files of `folder`, else Nones."""
    # An installed copy may lie inside somebody else's repository (a virtual environment in a project); its commit says
    # nothing about us.
    if not _run("git", "-C", str(folder), "ls-files", "."):
        return None, None
    commit = _run("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None, None
    return commit, bool(_run("git", "-C", str(folder), "status", "--porcelain"))


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    # A container may be given fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
