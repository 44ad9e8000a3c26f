"""A decode step recorded as an array of ops, which a replay runs in one call of the library."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllama.kernels.native.library import Op, load, recording


class NativeGraph:
    """The ops of a function and their tensors. Values that change between replays are read from the tensors."""

    def __init__(self) -> None:
        self._ops = (Op * 0)()
        self._tensors: list[Tensor] = []  # keeps their memory

    def capture(self, launches: Callable[[], object]) -> None:
        """Record the function's ops without running them.

        Raises RuntimeError if it runs an operation of torch, which a replay would not repeat.
        """
        if recording.ops is not None:
            raise RuntimeError("a graph is being recorded on this thread: end that first")
        recording.ops, recording.tensors = [], []
        try:
            with _OnlyViews():
                launches()
            self._ops, self._tensors = (Op * len(recording.ops))(*recording.ops), recording.tensors
        finally:
            recording.ops, recording.tensors = None, []

    def replay(self) -> None:
        """Run the ops, on as many threads as torch uses."""
        load().fastllama_run(ctypes.byref(self._ops), len(self._ops), torch.get_num_threads())


class _OnlyViews(TorchDispatchMode):
    """Refuses operations of torch that compute. Views are allowed, and what allocates an op's result."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: skipping it imports torch.compile, which takes a second and 70 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if recording.allocating:
            return out
        memory = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
        results = {leaf.untyped_storage().data_ptr() for leaf in _tensors(out)}
        if func._schema.is_mutable or not results <= memory:
            raise RuntimeError(f"{func._schema.name} is not recorded: a captured step consists of native ops")
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
