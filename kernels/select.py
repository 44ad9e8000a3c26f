"""Selection of the backend, a module that exports the ops of `reference`. Done once, when a model is built."""

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch

from fastllama.kernels import reference
from fastllama.kernels.launch.checks import MODEL_DTYPES
from fastllama.kernels.native import library

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "fused", "native")
MIN_CAPABILITY = (8, 0)  # the first compute capability with bfloat16 matrix instructions


def backend(name: str | None, device: torch.device, dtype: torch.dtype | None = None) -> ModuleType:
    """The backend module of this name, or the device's default if name is None.

    The default is "fused" on a GPU that supports it, "native" on a CPU, and "reference" if those cannot run, or if the
    model's dtype is given and is none of MODEL_DTYPES. Raises ValueError for an unknown name, and for a backend that
    cannot run: "fused" without triton, on an older GPU, or on a CPU without Triton's interpreter, and "native" on a
    GPU or if its C++ kernels were not built.
    """
    if name is None:
        name = _default(device) if dtype is None or dtype in MODEL_DTYPES else "reference"
    if not isinstance(name, str) or name not in BACKENDS:
        known = ", ".join(repr(known) for known in BACKENDS)
        raise ValueError(f"backend must be one of {known}, got {name!r}: leave it out to get the one for {device}")
    if name == "reference":
        return reference
    obstacle = _fused_obstacle(device) if name == "fused" else _native_obstacle(device)
    if obstacle is not None:
        raise ValueError(f'backend "{name}" does not run here: {obstacle}; backend="reference" does')
    return importlib.import_module(f"fastllama.kernels.{name}")


def instruction_set(name: str | None, device: torch.device) -> str | None:
    """The CPU's instruction set that the backend's kernels use; None for a backend without kernels for CPUs."""
    if backend(name, device).__name__.rpartition(".")[2] != "native":
        return None
    return library.instruction_set()


def _default(device: torch.device) -> str:
    if device.type == "cuda":
        return "fused" if _fused_obstacle(device) is None else "reference"
    if (obstacle := _native_obstacle(device)) is None:
        return "native"
    _warn(obstacle)
    return "reference"


@functools.cache
def _warn(obstacle: str) -> None:
    """Once for each reason."""
    logger.warning('backend "reference" runs on this CPU, slower than "native" would: %s', obstacle)


def _fused_obstacle(device: torch.device) -> str | None:
    """Why the fused backend does not run on a device, with the remedy; None if it runs."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton, on Linux)"
    from fastllama.kernels.launch.interpreter import interpreting

    if interpreting():
        return None
    if device.type != "cuda":
        return (
            f"its kernels need a GPU and the device is {str(device)!r}. To run them in triton's interpreter, which is "
            "slow, set the environment variable TRITON_INTERPRET=1 before python starts"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"its kernels need compute capability 8.0 or higher and the GPU has {major}.{minor}"
    return None


def _native_obstacle(device: torch.device) -> str | None:
    """Why the native backend does not run on a device, with the remedy; None where it runs."""
    if device.type != "cpu":
        return f"its kernels need a CPU and the device is {str(device)!r}"
    return library.obstacle()
