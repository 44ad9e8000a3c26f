"""How calls are timed: what comes before each, what is left out, and who else was busy meanwhile."""

import contextlib
import os
import time
from collections.abc import Callable

import psutil
import torch

from fastllama.cuda_graph import CudaGraph

CPU_BUFFER_BYTES = 256 * 2**20  # several times the last-level cache of any CPU that is likely to run this
CUDA_BUFFER_BYTES = 2**30


def buffer_bytes(device: torch.device) -> int:
    """More than the caches of a device hold."""
    return CUDA_BUFFER_BYTES if device.type == "cuda" else CPU_BUFFER_BYTES


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on `device`; a CPU has nothing to wait for."""
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
    """Seconds of each of at least `repeats` calls, going on until `seconds` have passed.

    `warmup` calls before them are not timed, nor is `before`, which runs before each. On CUDA each call stands between
    two events, so the host's own time between launches is not counted.
    """
    for _ in range(warmup):
        call()
    synchronize(device)
    if device.type == "cuda":
        return _time_calls_cuda(call, device, repeats, seconds, before)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < repeats or time.perf_counter() - begin < seconds:
        if before is not None:
            before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _time_calls_cuda(
    call: Callable[[], object],
    device: torch.device,
    repeats: int,
    seconds: float,
    before: Callable[[], object] | None,
) -> list[float]:
    times: list[float] = []
    begin = time.perf_counter()
    with torch.cuda.device(device):
        while len(times) < repeats or time.perf_counter() - begin < seconds:
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(max(1, repeats))
            ]
            for start, end in events:
                if before is not None:
                    before()
                start.record()
                call()
                end.record()
            synchronize(device)
            times += [start.elapsed_time(end) / 1e3 for start, end in events]
    return times


def replayed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On CUDA what replays `call`'s launches from a graph, so that the host is not what is timed; elsewhere `call`."""
    if device.type != "cuda":
        return call
    call()  # compiles what has to be compiled
    synchronize(device)
    graph = CudaGraph.alone(device)
    graph.capture(call)
    return graph.replay


class CacheFlush:
    """Called, fills every cache with other things: what runs next finds nothing of its own there."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.randn(buffer_bytes(device) // 4, device=device)

    def __call__(self) -> None:
        self._buffer.sum()  # reads: what had been written would be on its way to memory in the time of others


class Contention:
    """How much of the CPUs others use, from its creation on: the first thing to look at when figures disagree.

    Others are processes that are neither this one nor its children, nor share the model with it.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float:
        """Cores that others kept busy, stolen time included."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()._asdict()
        # Linux counts a guest's time in the user's as well.
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
