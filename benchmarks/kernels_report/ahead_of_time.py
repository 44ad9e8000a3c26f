"""GPUs that are not here: a stand-in for triton's driver that compiles for them and records what would be launched.

The project's own launch wrappers, called on tensors of the real shapes, specialise and compile exactly what they would
launch on such a GPU; nothing runs. Tensors may be memory that was never touched, so that even 70B's weights cost
nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastllama.kernels.launch.target import target_of


class Gpu(NamedTuple):
    """What the compiler and the launch tables need to know of a GPU."""

    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    processors: int  # streaming multiprocessors, or compute units
    shared_bytes: int  # that one program may have
    title: str


# Shared memory and registers: NVIDIA's CUDA programming guide, "Compute capabilities", and AMD's CDNA 3 ISA guide.
GPUS = {
    "sm_80": Gpu("cuda", 80, 32, 108, 166912, "A100"),
    "sm_86": Gpu("cuda", 86, 32, 82, 101376, "RTX 3090"),
    "sm_89": Gpu("cuda", 89, 32, 128, 101376, "RTX 4090"),
    "sm_90": Gpu("cuda", 90, 32, 132, 232448, "H200"),
    "sm_100": Gpu("cuda", 100, 32, 148, 232448, "B200"),
    "sm_120": Gpu("cuda", 120, 32, 170, 101376, "RTX 5090"),
    "gfx942": Gpu("hip", "gfx942", 64, 304, 65536, "MI300X"),
}


class Launch(NamedTuple):
    """One kernel that would have been launched."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the kernel's own names
    compiled: Any  # triton's CompiledKernel: asm, metadata, src


@contextmanager
def recorded(gpu: Gpu) -> Iterator[list[Launch]]:
    """Within the block kernels are compiled for `gpu` and appended to the list instead of being launched.

    One GPU a process: triton keeps what it has compiled by the number of the device, which is always 0 here.
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
    driver.set_active(_Driver(gpu))
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
    """As much of triton's driver as compiling for a GPU asks for."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.utils = _Utilities(gpu)
        self.launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.gpu.backend, self.gpu.arch, self.gpu.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True


class _Utilities:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.gpu.shared_bytes,
            "multiprocessor_count": self.gpu.processors,
            "warpSize": self.gpu.warp_size,
            "max_num_regs": 65536,
        }

    def load_binary(self, *binary: Any) -> tuple[int, int, int, int, int]:
        """module, function, registers, spills, most threads: nothing is loaded."""
        return (0, 0, 0, 0, 1024)

    def unload_module(self, *module: Any) -> None:
        pass


class _Launcher:
    """Launches nothing."""

    def __init__(self, *source: Any) -> None:
        pass

    def __call__(self, *launch: Any) -> None:
        pass


def compiling_environment(cache: str) -> dict[str, str]:
    """The environment of a process that compiles: no interpreter, and a compilation cache of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"TRITON_CACHE_DIR": cache}
