"""The machine, versions, commit and command of a result, so that it can be repeated and compared.

A value that is not known (no GPU, no git, an installed wheel) is None.
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
    """What one run was measured on. `git_dirty` says whether files differ from the commit."""

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
    instruction_set: str | None = None  # of the CPU, as the native kernels use it
    clocks: str | None = None  # a GPU's SM and memory clocks at the start


def describe_environment(device: torch.device | str, instruction_set: str | None = None) -> Environment:
    """The environment of this process, with `device`. instruction_set: of the CPU, as the backend's kernels use it."""
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    cpu = _cpu_model()
    commit, dirty = git_state(Path(__file__).resolve().parent)
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(),
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
        instruction_set=instruction_set,
        clocks=_run("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader") if on_cuda else None,
    )


def _command() -> str:
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else shlex.quote(program.name)
    return " ".join([name, shlex.join(sys.argv[1:])]).strip()


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, whether the work tree differs) of the repository that tracks `folder`, or (None, None) without one."""
    # An installed copy can be inside another project's repository, for example in a virtual environment.
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
    # A container can have fewer cores than the machine.
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
