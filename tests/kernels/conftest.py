"""Fixtures of all kernel tests: allocated memory is between guard bands and holds NaN until it is written."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.kernels.launch import interpreter
from tests.kernels.guards import GuardedMemory


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch, nan_in_empty_memory: None) -> Iterator[GuardedMemory]:
    """Memory for a test's own tensors. torch.empty, empty_like and zeros also allocate from it."""
    memory = GuardedMemory()

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = "cpu", **options: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        assert not options, f"an allocation with {sorted(options)} is not guarded"
        return memory.empty(*shape, dtype=dtype or torch.get_default_dtype(), device=device)

    def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return memory.empty(*tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)

    def zeros(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).zero_()

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield memory
    memory.check()


@pytest.fixture(autouse=True, scope="session")
def patched_interpreter() -> None:
    """Patch the interpreter, as importing `fastllama.kernels.fused` does, for tests that do not import it."""
    if interpreter.interpreting():
        interpreter.patch()
