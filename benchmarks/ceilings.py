"""The machine's ceilings: how fast it reads memory, copies memory and multiplies matrices.

A speed is reported as a share of a ceiling from the same run. A ceiling is the median of calls without a pause, because
decoding reads without a pause; short bursts can reach nearly twice that rate. A shared machine's speed drifts, so read
bandwidth and matmul rate are sampled next to the work that is compared with them (`AdjacentSamples`).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from fastllama.benchmarks.statistics import GIGA, TERA, Summary, percentile, summarize
from fastllama.benchmarks.timing import random_buffer, time_calls
from fastllama.checkpoint.base import dtype_name
from fastllama.speed_of_light import Machine

CPU_MATMUL_SIZE = 1024
CUDA_MATMUL_SIZE = 8192
PROBE_SECONDS = 0.2


@dataclass(frozen=True)
class Ceiling:
    """One limit of the machine, with its samples. Shares are taken of `value`, the median."""

    name: str
    unit: str
    method: str
    samples: Summary

    @property
    def value(self) -> float:
        return self.samples.p50


class Probe:
    """Measures one rate of the machine, any number of times. `amount`: the work of a `call`, in `unit` without "/s"."""

    def __init__(
        self, name: str, unit: str, method: str, device: torch.device, call: Callable[[], object], amount: float
    ) -> None:
        self._name, self._unit, self._method = name, unit, method
        self._device, self._call, self._amount = device, call, amount
        self._threads = torch.get_num_threads()
        self._rates: list[float] = []

    def sample(self, seconds: float = PROBE_SECONDS) -> Summary:
        """The rate of calls that are repeated without a pause for `seconds`."""
        with _threads(self._threads):
            times = time_calls(self._call, device=self._device, warmup=1, repeats=3, seconds=seconds)
        rates = [self._amount / second for second in times]
        self._rates += rates
        return summarize(rates)

    def ceiling(self) -> Ceiling:
        """All samples so far as one ceiling. Takes a sample first if there is none."""
        if not self._rates:
            self.sample()
        return Ceiling(self._name, self._unit, self._method, summarize(self._rates))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use `count` CPU threads within the block: a process that shares a model has set fewer."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ReadProbe(Probe):
    """Read bandwidth in GB/s: the fastest torch reduction of random numbers in a buffer larger than any cache."""

    def __init__(self, device: torch.device, n_bytes: int | None = None) -> None:
        buffer = random_buffer(device, n_bytes)
        reductions: dict[str, Callable[[], object]] = {"sum": buffer.sum, "amax": buffer.amax}
        medians = {
            name: percentile(time_calls(call, device=device, repeats=5), 50) for name, call in reductions.items()
        }
        fastest = min(medians, key=medians.__getitem__)
        method = f"torch {fastest} of {buffer.nbytes / 2**20:.0f} MiB of float32, sustained"
        super().__init__("read", "GB/s", method, device, reductions[fastest], buffer.nbytes / GIGA)


class MatmulProbe(Probe):
    """The rate of matrix multiplication in TFLOP/s: square random matrices by the library."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int | None = None) -> None:
        size = size or (CUDA_MATMUL_SIZE if device.type == "cuda" else CPU_MATMUL_SIZE)
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        call = partial(torch.matmul, left, right)
        super().__init__("matmul", "TFLOP/s", f"{size} x {size} {dtype_name(dtype)}", device, call, 2 * size**3 / TERA)


def copy_ceiling(device: torch.device, n_bytes: int | None = None, seconds: float = PROBE_SECONDS) -> Ceiling:
    """Copy bandwidth in GB/s, counting the bytes read and the bytes written."""
    source = random_buffer(device, n_bytes)
    method = f"torch copy of {source.nbytes / 2**20:.0f} MiB, bytes read and written"
    call = partial(torch.empty_like(source).copy_, source)
    probe = Probe("copy", "GB/s", method, device, call, 2 * source.nbytes / GIGA)
    probe.sample(seconds)
    return probe.ceiling()


class Probes:
    """The probes of one run. Copy bandwidth is measured once, the other two rates next to every figure."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.read, self.copy, self.matmul = ReadProbe(device), copy_ceiling(device), MatmulProbe(device, dtype)

    def ceilings(self) -> dict[str, Ceiling]:
        return {"read": self.read.ceiling(), "copy": self.copy, "matmul": self.matmul.ceiling()}


class AdjacentSamples:
    """Samples a probe before and after each piece of work. The higher sample never overstates a share."""

    def __init__(self, probe: Probe) -> None:
        self._probe, self._latest = probe, probe.sample().p50

    def higher(self) -> float:
        """Take a sample after the work. Returns the higher of the samples before and after."""
        before, self._latest = self._latest, self._probe.sample().p50
        return max(before, self._latest)


def machine_of(read: float, matmul: float, devices: float = 1) -> Machine:
    """The Machine of `devices` devices, each with these rates in GB/s and TFLOP/s."""
    return Machine(read=devices * read * GIGA, matmul=devices * matmul * TERA)
