"""How many CPU threads a computation uses.

It uses as many as the caller set (`torch.set_num_threads`, OMP_NUM_THREADS), within three limits:

- the CPUs that the process may run on, and its container's share of their time. A thread that waits for a CPU delays
  all others at the end of every op.
- the OpenMP runtime. If OMP_THREAD_LIMIT, OMP_MAX_ACTIVE_LEVELS or OMP_DYNAMIC make it start fewer threads than it
  reports, oneDNN's matrix products silently leave out the missing threads' part of the result.
- the work. Little work is not worth a second thread, which on a busy machine costs a hundred times what it saves.

Settings are changed for the calling thread only, and restored.
"""

import contextlib
import ctypes
import functools
import logging
import math
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastllama import cgroups
from fastllama.kernels import onednn

logger = logging.getLogger(__name__)

# Multiply-adds that one thread does in about the time that it takes to start a second one on half of them.
SMALL_WORK = 64_000_000
SMALL_WEIGHT_BYTES = 2**25  # weights that fit the CPU's cache
LIMITING_PREFIXES = ("OMP_", "KMP_", "GOMP_")  # of the environment variables that configure OpenMP
SOFT_PAUSE = 1  # omp_pause_soft: settings are kept
PROBE_ROWS, PROBE_WIDTH, PROBE_OUTPUTS = 4, 64, 64  # exact in bfloat16 up to a width of 256 times values up to 127

_is_exact = False  # within use_exactly


def available() -> int:
    """How many threads a computation of the calling thread may use."""
    configured = torch.get_num_threads()
    count = configured if _is_exact else min(configured, cpus())
    return _openmp_threads(count) if count > 1 else 1


def cpus() -> int:
    """How many CPUs this process may keep busy: those it may run on, but no more than its container's quota."""
    visible = _openmp.cpus() or os.cpu_count() or 1
    quota = _quota()
    return visible if quota is None else max(1, min(visible, math.ceil(quota)))


@contextlib.contextmanager
def use_exactly(count: int) -> Iterator[None]:
    """A block in which all computation of this process uses `count` threads, also for few CPUs and little work."""
    global _is_exact
    before = torch.get_num_threads(), _is_exact
    torch.set_num_threads(count)
    _is_exact = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        _is_exact = before[1]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A block whose computation uses `available()` threads."""
    with _using(available()):
        yield


@contextlib.contextmanager
def for_work(multiply_adds: int, weight_bytes: int) -> Iterator[None]:
    """A block, inside a `limited` one, whose computation is this much work: little work runs on one thread."""
    if _is_exact or multiply_adds > SMALL_WORK or weight_bytes > SMALL_WEIGHT_BYTES:
        yield
        return
    with _using(1):
        yield


def end_openmp_threads() -> None:
    """End, or put to sleep, the threads that OpenMP has started for this thread. Its next op has threads again.

    Otherwise they keep their CPUs busy for some milliseconds after an op, and threads that are not OpenMP's wait.
    """
    _openmp.pause()


@contextlib.contextmanager
def _using(count: int) -> Iterator[None]:
    before, dynamic = torch.get_num_threads(), _openmp.dynamic()
    if count == before and not dynamic:
        yield
        return
    _openmp.set_dynamic(False)
    mkl = _openmp.set_threads(count)
    try:
        yield
    finally:
        _openmp.set_threads(before, mkl)
        _openmp.set_dynamic(dynamic)


def _openmp_threads(count: int) -> int:
    """How many of `count` threads the OpenMP runtime starts."""
    started = 1 if _openmp.max_active_levels() < 1 else min(count, _openmp.thread_limit())
    if (_dynamic_is_configured() and not _openmp.is_known) or not _products_are_complete(started):
        started = 1
    if started < count:
        _warn(count, started)
    return started


@functools.cache
def _products_are_complete(count: int) -> bool:
    """Whether matrix products on `count` threads are complete."""
    with _using(count):
        return all(_product_is_complete(count, dtype) for dtype in (torch.float32, torch.bfloat16))


def _product_is_complete(count: int, dtype: torch.dtype) -> bool:
    value = 1 + count % 100  # differs from the previous probe's, whose results may still be in the same memory
    x = torch.full((PROBE_ROWS, PROBE_WIDTH), value, dtype=dtype, device="cpu")
    weight = torch.ones(PROBE_OUTPUTS * count, PROBE_WIDTH, dtype=dtype, device="cpu")
    products = F.linear(x, weight), onednn.linear(x, weight)
    return all(bool((product == PROBE_WIDTH * value).all()) for product in products)


@functools.cache
def _warn(count: int, started: int) -> None:
    named = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(LIMITING_PREFIXES)]
    reason = f" ({', '.join(named)})" if named else ""
    logger.warning("computing on %d of %d threads: OpenMP gives no more%s", started, count, reason)


def _dynamic_is_configured() -> bool:
    return os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1", "yes", "on")


@functools.cache
def _quota() -> float | None:
    return cgroups.cpu_quota() if platform.system() == "Linux" else None


class _OpenMP:
    """The OpenMP runtime that torch uses, if it can be found.

    torch.set_num_threads also sets the count of threads that start later; `set_threads` sets the calling thread's only.
    Without the runtime, it calls torch.set_num_threads.
    """

    def __init__(self) -> None:
        self._set_threads = self._function("omp_set_num_threads")
        self._get_dynamic, self._set_dynamic = self._function("omp_get_dynamic"), self._function("omp_set_dynamic")
        self._cpus = self._function("omp_get_num_procs")
        self._thread_limit = self._function("omp_get_thread_limit")
        self._max_active_levels = self._function("omp_get_max_active_levels")
        self._pause = self._function("omp_pause_resource_all")
        self._set_mkl = self._function("MKL_Set_Num_Threads_Local")
        self.is_known = self._set_threads is not None and self._set_dynamic is not None

    @staticmethod
    @functools.cache
    def _libraries() -> list[Any]:
        """The libraries with torch's symbols, in the order in which the loader searches them."""
        names = {"Linux": "libtorch_cpu.so", "Darwin": "libtorch_cpu.dylib", "Windows": "torch_cpu.dll"}
        path = Path(torch.__file__).parent / "lib" / names.get(platform.system(), "")
        libraries = []
        for name in (None, str(path)):
            with contextlib.suppress(OSError, TypeError):
                libraries.append(ctypes.CDLL(name))
        return libraries

    def _function(self, name: str) -> Callable[..., int] | None:
        return next((getattr(library, name) for library in self._libraries() if hasattr(library, name)), None)

    def cpus(self) -> int | None:
        """The CPUs that the calling thread may run on; if the runtime binds threads to CPUs, those of all threads."""
        if self._cpus is not None:
            return self._cpus()
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None

    def dynamic(self) -> bool:
        return self._get_dynamic is not None and bool(self._get_dynamic())

    def set_dynamic(self, on: bool) -> None:
        if self._set_dynamic is not None:
            self._set_dynamic(int(on))

    def thread_limit(self) -> int:
        return max(1, self._thread_limit()) if self._thread_limit is not None else 2**31 - 1

    def max_active_levels(self) -> int:
        return self._max_active_levels() if self._max_active_levels is not None else 1

    def pause(self) -> None:
        if self._pause is not None:
            self._pause(SOFT_PAUSE)

    def set_threads(self, count: int, mkl: int | None = None) -> int:
        """Set the calling thread's count, and MKL's to `mkl` or the same. Returns MKL's previous count, 0 for none."""
        if self._set_threads is None:
            torch.set_num_threads(count)
        else:
            self._set_threads(count)
        return self._set_mkl(count if mkl is None else mkl) if self._set_mkl is not None else 0


_openmp = _OpenMP()
