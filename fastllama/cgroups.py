"""What the control groups of Linux, version 1 and 2, let this process use: a container's limits.

A group's limit holds for all below it, so a limit is looked for in the process's group and in every one above, as far
as they can be seen: a container sees no more than its own. What cannot be read limits nothing.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

V1_UNLIMITED_BYTES = 2**60  # version 1 writes a limit that no machine reaches where there is none
RECLAIMABLE = ("inactive_file", "active_file")  # of memory.stat: copies of files, which the kernel gives up
MOUNTPOINT = PurePosixPath("/sys/fs/cgroup")


class FreeMemory(NamedTuple):
    """Bytes that may still be taken, and what limits them."""

    free: int
    limit: str  # where they are free, for a message


def free_memory(root: Path = Path("/")) -> FreeMemory | None:
    """What is left of the tightest memory limit; None without one. root: where /proc and /sys are."""
    found = [
        FreeMemory(max(0, limit - _used(group, usage, prefix)), f"in this container ({name} {limit / 2**20:.0f} MiB)")
        for version, group in _groups(root, "memory")
        for names, usage, prefix in (_MEMORY_FILES[version],)
        for name in names
        if (limit := _bytes(group / name)) is not None
    ]
    return min(found, default=None)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many CPUs' time the process may use (docker's --cpus); None without a limit."""
    quotas = [quota for version, group in _groups(root, "cpu") if (quota := _quota(version, group)) is not None]
    return min(quotas, default=None)


# By version: the files of limits, that of what is used, and what precedes names in memory.stat to count groups below.
_MEMORY_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
    2: (("memory.max", "memory.high"), "memory.current", ""),
}


def _groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of the process's groups for a controller, each with all above it that can be seen."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        mounted, mountpoint = _mount(root, controller if version == 1 else None)
        top = root / mountpoint.relative_to("/")
        inside = PurePosixPath(path)
        # A container may see its group as the top of the tree, while its path is the host's.
        below = inside.relative_to(mounted) if inside.is_relative_to(mounted) else PurePosixPath()
        if ".." in below.parts:
            below = PurePosixPath()
        for part in (below, *below.parents):
            if (top / part).is_dir():
                yield version, top / part


def _mount(root: Path, controller: str | None) -> tuple[PurePosixPath, PurePosixPath]:
    """The group that is mounted and where it is, for a controller of version 1, or for version 2 (None)."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, *_, options = after.split() or [""]
        fits = kind == "cgroup2" if controller is None else kind == "cgroup" and controller in options.split(",")
        if fits and len(fields := before.split()) > 4:
            return PurePosixPath(fields[3]), PurePosixPath(fields[4])
    return PurePosixPath("/"), MOUNTPOINT if controller is None else MOUNTPOINT / controller


def _used(group: Path, usage: str, prefix: str) -> int:
    """Bytes that a group uses and cannot give up."""
    pairs = [line.split() for line in _lines(group / "memory.stat")]
    stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
    reclaimable = sum(stat.get(prefix + name, stat.get(name, 0)) for name in RECLAIMABLE)
    return max(0, (_bytes(group / usage) or 0) - reclaimable)


def _quota(version: int, group: Path) -> float | None:
    if version == 2:
        words = " ".join(_lines(group / "cpu.max")).split()
    else:
        words = [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")]
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):  # "max", -1, or no such file
        return None
    return int(words[0]) / int(words[1])


def _bytes(path: Path) -> int | None:
    """The number in a file; None where there is none, or it is no limit."""
    words = " ".join(_lines(path)).split()
    if len(words) != 1 or not words[0].isdecimal() or int(words[0]) >= V1_UNLIMITED_BYTES:
        return None
    return int(words[0])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
