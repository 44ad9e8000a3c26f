"""Choose the backend: a module that exports the ops of `reference`. Called once, when a model is built."""

from types import ModuleType

import torch

from fastllama.kernels import reference

BACKENDS: dict[str, ModuleType] = {"reference": reference}


def backend(name: str | None, device: torch.device) -> ModuleType:
    """The ops for a device: those of the named backend, or the device's default where name is None.

    Raises ValueError for a name that is not a backend of this installation.
    """
    if name is None:
        name = "reference"
    if not isinstance(name, str) or name not in BACKENDS:
        known = ", ".join(repr(known) for known in BACKENDS)
        raise ValueError(f"backend must be one of {known}, got {name!r}: leave it out to get the one for {device}")
    return BACKENDS[name]
