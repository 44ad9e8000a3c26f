"""A CUDA graph's double on a CPU: records what a function launches, torch's operations and interpreted kernels alike.

A replay calls what was recorded, on the very tensors and numbers of the recording; Python is not run again. So whatever
a step takes from Python is frozen, as in a graph, and what needs the host in the middle of a step is refused.
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

# What a GPU answers only after all that was queued before it, or what has a result of unknown size.
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
INDEXING = {"aten::index", "aten::index_put_"}  # by a mask: the result's size is in the mask
ALLOCATING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class Tape(TorchDispatchMode):
    """One recording."""

    recording: "Tape | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Callable[[], None]]] = []  # name, what it does when replayed
        self.kept: list[object] = []  # views, so that their memory is nobody else's

    def capture(self, launches: Callable[[], object]) -> None:
        with _recorded_kernels(), self:
            Tape.recording = self
            try:
                launches()
            finally:
                Tape.recording = None

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
        # What lies in an argument's memory is a view of it, or the argument itself, changed in place.
        results = [leaf for leaf in _tensors(out) if leaf.untyped_storage().data_ptr() not in memory]
        if name in ALLOCATING or not (results or func._schema.is_mutable):
            self.kept.append(out)
            return out

        def again() -> None:
            new = _tensors(func(*args, **kwargs))
            for result, value in zip(results, new if results else [], strict=True):
                result.copy_(value)

        self.calls.append((name, again))
        return out


def _tensors(values: Any) -> list[Tensor]:
    """Those of them that have memory to speak of: not weights that oneDNN has packed."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


@contextmanager
def _recorded_kernels() -> Iterator[None]:
    """Interpreted kernels go on the tape, too."""
    run = interpreter.InterpretedFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        tape = Tape.recording
        with _disable_current_modes():
            result = run(self, *args, **kwargs)
        assert tape is not None
        tape.calls.append((self.fn.__name__, lambda: run(self, *args, **kwargs)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", recorded)
        yield
