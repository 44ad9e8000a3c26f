"""Times calls, on a CPU and with CUDA events, and measures how much of the CPUs other programs use."""

import contextlib
import os
import time
from collections.abc import Callable

import psutil
import torch

from fastllama.cuda_graph import CudaGraph

CPU_BUFFER_BYTES = 256 * 2**20  # several times the last-level cache of a large CPU
CUDA_BUFFER_BYTES = 2**30


def random_buffer(device: torch.device, n_bytes: int | None = None) -> torch.Tensor:
    """A buffer of random float32 numbers, by default larger than the device's caches."""
    n_bytes = n_bytes or (CUDA_BUFFER_BYTES if device.type == "cuda" else CPU_BUFFER_BYTES)
    return torch.randn(n_bytes // 4, device=device)


def synchronize(device: torch.device) -> None:
    """Wait for all launches on `device`. On a CPU there are none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    call: Callable[[], object],
    *,
    device: torch.device,
    warmup: int = 2,
    repeats: int = 10,
    seconds: float = 0.0,
    before: Callable[[], object] | None = None,
) -> list[float]:
    """The seconds of each call. There are at least `repeats` calls, and more until `seconds` have passed.

    `warmup` untimed calls come first. `before` runs before each timed call and is not timed. On CUDA each call is
    between two events, so the host's time between calls does not count.
    """
    for _ in range(warmup):
        call()
    synchronize(device)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < repeats or time.perf_counter() - begin < seconds:
        if device.type == "cuda":
            times += _time_with_events(call, device, max(1, repeats), before)
            continue
        if before is not None:
            before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _time_with_events(
    call: Callable[[], object], device: torch.device, repeats: int, before: Callable[[], object] | None
) -> list[float]:
    """The seconds of `repeats` calls that are queued without waiting for the device."""
    with torch.cuda.device(device):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            if before is not None:
                before()
            start.record()
            call()
            end.record()
        synchronize(device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def replayed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On CUDA, a function that replays the launches of `call` from a graph, without host time; else `call`."""
    if device.type != "cuda":
        return call
    call()  # compiles the kernels
    synchronize(device)
    graph = CudaGraph.standalone(device)
    graph.capture(call)
    return graph.replay


class CacheFlush:
    """Calling it fills every cache with other data, so that the next call reads memory."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = random_buffer(device)

    def __call__(self) -> None:
        self._buffer.sum()  # reads only: written data would go to memory while the next call is timed


class Contention:
    """Measures the CPU time of other processes, except children and processes that share the model."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float:
        """The number of cores that other processes used, including stolen time."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()._asdict()
        # On Linux a guest's time is part of the user's time.
        busy = sum(value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice"))
        own = 0.0
        top = psutil.Process()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's processes are siblings
            top = top.parent() or top
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                spent = process.cpu_times()
                own += spent.user + spent.system
        return time.perf_counter(), busy, own
