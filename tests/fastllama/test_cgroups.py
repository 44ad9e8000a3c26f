"""A container's limits, read from trees of files like those of Linux."""

from pathlib import Path

import pytest

from fastllama.cgroups import cpu_quota, free_memory

MIB = 2**20
Files = dict[str, str]
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "34 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
# Inside a container without its own cgroup namespace: its group is mounted as the top, and its path is the host's.
V1_INSIDE = "33 31 0:30 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"


def tree(root: Path, files: Files) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def v2(path: str, **files: str | int) -> Files:
    """The files of a version 2 group; two underscores stand for a dot in a file's name."""
    return {f"sys/fs/cgroup/{path}/{name.replace('__', '.')}": str(content) for name, content in files.items()}


def v1(path: str, **files: str | int) -> Files:
    """The files of a version 1 memory group, named as in `v2`."""
    return {f"sys/fs/cgroup/memory/{path}/{name.replace('__', '.')}": str(content) for name, content in files.items()}


MEMORY: dict[str, tuple[Files, int | None, str]] = {
    "none": ({}, None, ""),
    "v2-unlimited": (
        {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2_MOUNT}
        | v2("a", memory__max="max\n", memory__current=7 * MIB, memory__high="max"),
        None,
        "",
    ),
    "v2": (
        {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2_MOUNT}
        | v2(
            "a",
            memory__max=f"{512 * MIB}\n",
            memory__current=300 * MIB,
            memory__stat=f"anon {200 * MIB}\ninactive_file {60 * MIB}\nactive_file {40 * MIB}\nodd line here\n",
        ),
        312 * MIB,
        "in this container (memory.max 512 MiB)",
    ),
    "v2-high": (
        {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2_MOUNT}
        | v2("a", memory__max=512 * MIB, memory__high=100 * MIB, memory__current=30 * MIB),
        70 * MIB,
        "in this container (memory.high 100 MiB)",
    ),
    "v2-of-an-ancestor": (
        {"proc/self/cgroup": "0::/pods/pod1/box\n", "proc/self/mountinfo": V2_MOUNT}
        | v2("pods", memory__max="max", memory__current=900 * MIB)
        | v2("pods/pod1", memory__max=256 * MIB, memory__current=200 * MIB)
        | v2("pods/pod1/box", memory__max=240 * MIB, memory__current=10 * MIB),
        56 * MIB,
        "in this container (memory.max 256 MiB)",
    ),
    "v2-namespace": (
        {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT}
        | v2(".", memory__max=64 * MIB, memory__current=MIB),
        63 * MIB,
        "in this container (memory.max 64 MiB)",
    ),
    "v2-outside-the-namespace": (
        {"proc/self/cgroup": "0::/../../other\n", "proc/self/mountinfo": V2_MOUNT}
        | v2(".", memory__max=64 * MIB, memory__current=MIB),
        63 * MIB,
        "in this container (memory.max 64 MiB)",
    ),
    "v2-path-that-is-not-mounted": (
        {"proc/self/cgroup": "0::/docker/abc\n", "proc/self/mountinfo": V2_MOUNT}
        | v2(".", memory__max=64 * MIB, memory__current=2 * MIB),
        62 * MIB,
        "in this container (memory.max 64 MiB)",
    ),
    "v2-without-mountinfo": (
        {"proc/self/cgroup": "0::/a\n"} | v2("a", memory__max=64 * MIB, memory__current=4 * MIB),
        60 * MIB,
        "in this container (memory.max 64 MiB)",
    ),
    "v2-used-up": (
        {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2_MOUNT}
        | v2("a", memory__max=64 * MIB, memory__current=80 * MIB),
        0,
        "in this container (memory.max 64 MiB)",
    ),
    "v2-nonsense": (
        {"proc/self/cgroup": "0::/a\nwhat\n", "proc/self/mountinfo": V2_MOUNT + "short - \n - cgroup2\n"}
        | v2("a", memory__max="a lot", memory__current="", memory__high=""),
        None,
        "",
    ),
    "v1-unlimited": (
        {"proc/self/cgroup": "4:memory:/a\n", "proc/self/mountinfo": V1_MOUNTS}
        | v1("a", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=MIB),
        None,
        "",
    ),
    "v1-hybrid": (
        {"proc/self/cgroup": "9:name=systemd:/\n4:memory:/a/b\n0::/a/b\n", "proc/self/mountinfo": V1_MOUNTS}
        | v1(
            "a",
            memory__limit_in_bytes=400 * MIB,
            memory__usage_in_bytes=350 * MIB,
            memory__stat=f"inactive_file 5\ntotal_inactive_file {30 * MIB}\ntotal_active_file {20 * MIB}\n",
        )
        | v1("a/b", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=MIB)
        | {"sys/fs/cgroup/unified/a/b/cgroup.procs": ""},
        100 * MIB,
        "in this container (memory.limit_in_bytes 400 MiB)",
    ),
    "v1-inside": (
        {"proc/self/cgroup": "4:memory:/docker/abc/inner\n", "proc/self/mountinfo": V1_INSIDE}
        | v1(".", memory__limit_in_bytes=300 * MIB, memory__usage_in_bytes=100 * MIB)
        | v1("inner", memory__limit_in_bytes=250 * MIB, memory__usage_in_bytes=100 * MIB),
        150 * MIB,
        "in this container (memory.limit_in_bytes 250 MiB)",
    ),
}


@pytest.mark.parametrize("case", MEMORY)
def test_free_memory(tmp_path: Path, case: str) -> None:
    files, free, limit = MEMORY[case]
    found = free_memory(tree(tmp_path, files))
    assert found == (None if free is None else (free, limit))


QUOTAS: dict[str, tuple[Files, float | None]] = {
    "none": ({}, None),
    "v2": ({"proc/self/cgroup": "0::/a\n"} | v2("a", cpu__max="150000 100000\n"), 1.5),
    "v2-unlimited": ({"proc/self/cgroup": "0::/a\n"} | v2("a", cpu__max="max 100000\n"), None),
    "v2-ancestor": (
        {"proc/self/cgroup": "0::/a/b\n"} | v2("a", cpu__max="50000 100000\n") | v2("a/b", cpu__max="max 100000"),
        0.5,
    ),
    "v2-nonsense": ({"proc/self/cgroup": "0::/a\n"} | v2("a", cpu__max="100000 0\n"), None),
    "v1": (
        {
            "proc/self/cgroup": "2:cpu,cpuacct:/a\n",
            "proc/self/mountinfo": V1_MOUNTS,
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        },
        3.0,
    ),
    "v1-unlimited": (
        {
            "proc/self/cgroup": "2:cpu,cpuacct:/a\n",
            "proc/self/mountinfo": V1_MOUNTS,
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "v1-without-period": (
        {"proc/self/cgroup": "2:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n"},
        None,
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_cpu_quota(tmp_path: Path, case: str) -> None:
    files, quota = QUOTAS[case]
    assert cpu_quota(tree(tmp_path, files)) == quota


def test_a_file_that_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/self/cgroup": "0::/a\n"} | v2("a", memory__current=MIB))
    (tmp_path / "sys/fs/cgroup/a/memory.max").mkdir()  # reading it fails, as it does without permission
    assert free_memory(tmp_path) is None
