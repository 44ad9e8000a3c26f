"""The ground every benchmark stands on: timing, statistics and the machine's ceilings.

A speed means little alone, so each is reported against what the machine could do in the same run: how fast it reads
memory, copies it and multiplies matrices. Two habits follow from machines whose speed drifts, as shared ones do:

* The read ceiling is a *sustained* one, the median of reads that follow each other without a pause, because that is how
  decoding reads. Short bursts may run at nearly twice that rate; the best seen is kept beside the median, never mixed
  into it.
* A ceiling is sampled next to the work that is compared with it (`ReadProbe`), not once at the start.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch

from fastllama.cuda_graph import CudaGraph

CPU_BUFFER_BYTES = 256 * 2**20  # several times the last-level cache of any CPU that is likely to run this
CUDA_BUFFER_BYTES = 2**30
CPU_MATMUL_SIZE = 1024
CUDA_MATMUL_SIZE = 8192
PROBE_SECONDS = 0.2
MILLI = 1e3  # of a second's
MICRO = 1e6
NANO = 1e9
GIGA = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Summary:
    """Percentiles of some samples, in the samples' own unit."""

    count: int
    minimum: float
    p10: float
    p50: float
    p90: float
    p99: float
    maximum: float

    @property
    def spread(self) -> float:
        """(p90 - p10) / median: how far apart ordinary samples lie, as a share of the median."""
        return (self.p90 - self.p10) / self.p50 if self.p50 else 0.0


def percentile(samples: Iterable[float], percent: float) -> float:
    """The `percent`-th percentile (0 to 100), interpolated linearly between neighbours. ValueError without samples."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples: a percentile needs at least one")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must lie between 0 and 100, got {percent}")
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(samples: Iterable[float]) -> Summary:
    """The Summary of `samples`. ValueError when there are none or one is not finite."""
    values = list(samples)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"samples must be finite, got {values}")
    p10, p50, p90, p99 = (percentile(values, percent) for percent in (10, 50, 90, 99))
    return Summary(len(values), min(values), p10, p50, p90, p99, max(values))


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
        size = CUDA_BUFFER_BYTES if device.type == "cuda" else CPU_BUFFER_BYTES
        self._buffer = torch.randn(size // 4, device=device)

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


@dataclass(frozen=True)
class Ceiling:
    """One limit of the machine, with its samples. `value`, what shares are taken of, is their median."""

    name: str
    unit: str
    method: str
    samples: Summary

    @property
    def value(self) -> float:
        return self.samples.p50


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many CPU threads within the block: a process that shares a model has fewer than the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ReadProbe:
    """Measures read bandwidth, now and again later: random numbers beyond every cache, reduced to a scalar.

    Of torch's reductions the one that reads fastest here is taken; which one that is differs between machines.
    """

    def __init__(self, device: torch.device, buffer_bytes: int | None = None) -> None:
        self._device, self._threads = device, torch.get_num_threads()
        default_bytes = CUDA_BUFFER_BYTES if device.type == "cuda" else CPU_BUFFER_BYTES
        buffer = torch.randn((buffer_bytes or default_bytes) // 4, device=device)
        self._bytes = buffer.numel() * buffer.element_size()
        self._seen: list[float] = []
        methods: dict[str, Callable[[], object]] = {"sum": buffer.sum, "amax": buffer.amax}
        medians = {name: percentile(time_calls(call, device=device, repeats=5), 50) for name, call in methods.items()}
        self.method = min(medians, key=medians.__getitem__)
        self._call = methods[self.method]

    def sample(self, seconds: float = PROBE_SECONDS) -> Summary:
        """GB/s of reads repeated without a pause for `seconds`."""
        with _threads(self._threads):
            times = time_calls(self._call, device=self._device, warmup=1, repeats=3, seconds=seconds)
        rates = [self._bytes / second / GIGA for second in times]
        self._seen += rates
        return summarize(rates)

    def ceiling(self) -> Ceiling:
        """Every sample so far as one ceiling; takes one first if there is none."""
        if not self._seen:
            self.sample()
        method = f"torch {self.method} of {self._bytes / 2**20:.0f} MiB of float32, sustained"
        return Ceiling("read", "GB/s", method, summarize(self._seen))


def copy_ceiling(device: torch.device, buffer_bytes: int | None = None, seconds: float = PROBE_SECONDS) -> Ceiling:
    """Copy bandwidth in GB/s, counting the bytes read and the bytes written."""
    default_bytes = CUDA_BUFFER_BYTES if device.type == "cuda" else CPU_BUFFER_BYTES
    source = torch.randn((buffer_bytes or default_bytes) // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    times = time_calls(lambda: target.copy_(source), device=device, repeats=3, seconds=seconds)
    method = f"torch copy of {moved / 2**21:.0f} MiB, bytes read and written"
    return Ceiling("copy", "GB/s", method, summarize(moved / second / GIGA for second in times))


class MatmulProbe:
    """Measures the rate of matrix multiplication, now and again later: square random matrices by the library."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int | None = None) -> None:
        self._device, self._threads = device, torch.get_num_threads()
        self._size = size or (CUDA_MATMUL_SIZE if device.type == "cuda" else CPU_MATMUL_SIZE)
        self._factors = [torch.randn(self._size, self._size, device=device).to(dtype) for _ in range(2)]
        self._dtype = str(dtype).removeprefix("torch.")
        self._seen: list[float] = []

    def sample(self, seconds: float = PROBE_SECONDS) -> Summary:
        """TFLOP/s of products repeated for `seconds`."""
        left, right = self._factors
        with _threads(self._threads):
            times = time_calls(lambda: left @ right, device=self._device, warmup=1, repeats=3, seconds=seconds)
        rates = [2 * self._size**3 / second / TERA for second in times]
        self._seen += rates
        return summarize(rates)

    def ceiling(self) -> Ceiling:
        """Every sample so far as one ceiling; takes one first if there is none."""
        if not self._seen:
            self.sample()
        return Ceiling("matmul", "TFLOP/s", f"{self._size} x {self._size} {self._dtype}", summarize(self._seen))
