"""Compiles kernels for GPUs that are not present, through a replacement of triton's driver.

The project's own launch wrappers run on CPU tensors of the real shapes, so they compile exactly the kernels that they
would launch on such a GPU. Nothing is executed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastllama.kernels.launch.target import Target, target_of


@dataclass(frozen=True)
class Gpu(Target):
    """A kind of GPU with the name of a product."""

    title: str = ""


# Shared memory and registers: NVIDIA's CUDA programming guide, "Compute capabilities", and AMD's CDNA 3 ISA guide.
GPUS = {
    "sm_80": Gpu("cuda", 80, 108, 166912, title="A100"),
    "sm_86": Gpu("cuda", 86, 82, 101376, title="RTX 3090"),
    "sm_89": Gpu("cuda", 89, 128, 101376, title="RTX 4090"),
    "sm_90": Gpu("cuda", 90, 132, 232448, title="H200"),
    "sm_100": Gpu("cuda", 100, 148, 232448, title="B200"),
    "sm_120": Gpu("cuda", 120, 170, 101376, title="RTX 5090"),
    "gfx942": Gpu("hip", "gfx942", 304, 65536, warp_size=64, title="MI300X"),
}


class Launch(NamedTuple):
    """One recorded launch of a kernel."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the kernel's parameter names
    compiled: Any  # triton's CompiledKernel: asm, metadata, src


@contextmanager
def record_launches(target: Target) -> Iterator[list[Launch]]:
    """Within the block, kernels are compiled for `target` and appended to the list instead of being launched.

    Use one target per process: triton caches compiled kernels by device number, which is always 0 here.
    RuntimeError in a process whose kernels are interpreted.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted in this process: start it without TRITON_INTERPRET to compile them")
    launches: list[Launch] = []
    run: Callable[..., Any] = JITFunction.run

    def recording_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self.fn.__name__, tuple(grid), arguments, compiled))
        return compiled

    driver = triton.runtime.driver
    before = getattr(driver, "_active", None)
    driver.set_active(_Driver(target))
    target_of.cache_clear()
    JITFunction.run = recording_run
    try:
        yield launches
    finally:
        JITFunction.run = run
        target_of.cache_clear()
        if before is not None:
            driver.set_active(before)


class _Driver:
    """The parts of triton's driver, and of its `utils`, that compilation uses. Loads and launches nothing."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, *source: Any) -> Callable[..., None]:
        return lambda *launch: None

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared_bytes, "multiprocessor_count": self.target.processors}

    def load_binary(self, *binary: Any) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, maximum of threads)."""
        return (0, 0, 0, 0, 1024)

    def unload_module(self, *module: Any) -> None:
        pass


def compiling_environment(cache: str) -> dict[str, str]:
    """The environment of a process that compiles kernels into its own cache, without the interpreter."""
    return os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
