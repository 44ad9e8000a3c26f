"""The machine's ceilings: how fast it reads memory, copies it and multiplies matrices.

A speed means little alone, so each is reported against what the machine could do in the same run. Shared machines
drift, so two rules hold:

* The read ceiling is *sustained*: the median of reads without a pause, because that is how decoding reads. Short bursts
  may run at nearly twice that rate; the best one is kept beside the median, never mixed into it.
* A ceiling is sampled next to the work that is compared with it (`ReadProbe`), not once at the start.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastllama.benchmarks.statistics import GIGA, TERA, Summary, percentile, summarize
from fastllama.benchmarks.timing import buffer_bytes, time_calls

CPU_MATMUL_SIZE = 1024
CUDA_MATMUL_SIZE = 8192
PROBE_SECONDS = 0.2


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

    def __init__(self, device: torch.device, n_bytes: int | None = None) -> None:
        self._device, self._threads = device, torch.get_num_threads()
        buffer = torch.randn((n_bytes or buffer_bytes(device)) // 4, device=device)
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


def copy_ceiling(device: torch.device, n_bytes: int | None = None, seconds: float = PROBE_SECONDS) -> Ceiling:
    """Copy bandwidth in GB/s, counting the bytes read and the bytes written."""
    source = torch.randn((n_bytes or buffer_bytes(device)) // 4, device=device)
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
