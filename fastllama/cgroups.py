"""A container's memory and CPU limits, from Linux control groups, version 1 and 2.

A group's limit applies to all groups below it, so limits are read from the process's group and from every group above
it that is visible; a container sees only its own. A file that cannot be read counts as no limit.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

V1_UNLIMITED_BYTES = 2**60  # version 1 writes a number above any machine's memory for "no limit"
RECLAIMABLE = ("inactive_file", "active_file")  # in memory.stat: the page cache, which the kernel can free
MOUNTPOINT = PurePosixPath("/sys/fs/cgroup")


class FreeMemory(NamedTuple):
    """Bytes that are free, and what limits them."""

    free: int
    limit: str  # a phrase for error messages, such as "on this machine"


def free_memory(root: Path = Path("/")) -> FreeMemory | None:
    """The memory left under the tightest limit; None without a limit. root: the folder of /proc and /sys."""
    limits = [
        FreeMemory(max(0, limit - _used(group, usage, prefix)), f"in this container ({name} {limit / 2**20:.0f} MiB)")
        for version, group in _groups(root, "memory")
        for names, usage, prefix in (_MEMORY_FILES[version],)
        for name in names
        if (limit := _bytes(group / name)) is not None
    ]
    return min(limits, default=None)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many CPUs' time the process may use (docker's --cpus); None without a limit."""
    quotas = [quota for version, group in _groups(root, "cpu") if (quota := _quota(version, group)) is not None]
    return min(quotas, default=None)


# By version: the files with limits, the file with the usage, and the prefix of memory.stat's names that include the
# groups below.
_MEMORY_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
    2: (("memory.max", "memory.high"), "memory.current", ""),
}


def _groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of the process's groups for a controller, and of all visible groups above them."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        mounted, mountpoint = _mount(root, controller if version == 1 else None)
        top = root / mountpoint.relative_to("/")
        inside = PurePosixPath(path)
        # In a container, the group may be mounted as the top of the tree while `path` is the host's path.
        below = inside.relative_to(mounted) if inside.is_relative_to(mounted) else PurePosixPath()
        if ".." in below.parts:
            below = PurePosixPath()
        for part in (below, *below.parents):
            if (top / part).is_dir():
                yield version, top / part


def _mount(root: Path, controller: str | None) -> tuple[PurePosixPath, PurePosixPath]:
    """(mounted group, mount point) of a version 1 controller; None means version 2."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, *_, options = after.split() or [""]
        fits = kind == "cgroup2" if controller is None else kind == "cgroup" and controller in options.split(",")
        if fits and len(fields := before.split()) > 4:
            return PurePosixPath(fields[3]), PurePosixPath(fields[4])
    return PurePosixPath("/"), MOUNTPOINT if controller is None else MOUNTPOINT / controller


def _used(group: Path, usage: str, prefix: str) -> int:
    """Bytes that a group uses and that the kernel cannot free."""
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
    """The number in a file; None if there is none, or if it means "no limit"."""
    words = " ".join(_lines(path)).split()
    if len(words) != 1 or not words[0].isdecimal() or int(words[0]) >= V1_UNLIMITED_BYTES:
        return None
    return int(words[0])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
