"""A CPU stand-in for a CUDA graph: records the torch operations and interpreted kernels that a function launches.

A replay repeats the recorded calls on the same tensors and numbers, without running the function's Python code. So
Python values are constants of the recording, as in a CUDA graph. An operation that synchronises with the host is an
error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

# Operations whose result is read by the host, or whose result size depends on data.
SYNCHRONISING = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::bincount",
}
INDEXING = {"aten::index", "aten::index_put_"}  # with a mask, the result's size depends on data
ALLOCATING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class RecordedGraph(TorchDispatchMode):
    """One graph: `capture` records it, `replay` repeats it."""

    recording: "RecordedGraph | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Callable[[], None]]] = []  # an operation's name, and what a replay calls
        self.kept: list[object] = []  # tensors without a replayed call; kept so that their memory is not reused

    def capture(self, launches: Callable[[], object]) -> None:
        with _recorded_kernels(), self:
            RecordedGraph.recording = self
            try:
                launches()
            finally:
                RecordedGraph.recording = None

    def replay(self) -> None:
        for _, call in self.calls:
            call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in SYNCHRONISING or (name in INDEXING and any(map(_is_mask, args[1]))):
            raise RuntimeError(f"{name} waits for the device inside a step")
        out = func(*args, **kwargs)
        memory = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
        # A result in an argument's memory is a view of it, or the argument itself, changed in place.
        results = [leaf for leaf in _tensors(out) if leaf.untyped_storage().data_ptr() not in memory]
        if name in ALLOCATING or not (results or func._schema.is_mutable):
            self.kept.append(out)
            return out

        def repeat() -> None:
            new = _tensors(func(*args, **kwargs))
            for result, value in zip(results, new if results else [], strict=True):
                result.copy_(value)

        self.calls.append((name, repeat))
        return out


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among the values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


@contextmanager
def _recorded_kernels() -> Iterator[None]:
    """Record interpreted kernels, too."""
    run = interpreter.InterpretedFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        graph = RecordedGraph.recording
        with _disable_current_modes():
            result = run(self, *args, **kwargs)
        assert graph is not None
        graph.calls.append((self.fn.__name__, lambda: run(self, *args, **kwargs)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", recorded)
        yield
