"""Bytes that launches move, counted argument by argument in the interpreter.

What is counted is what programs request: the elements of each load and store that its mask lets through. A vector that
every program reads counts once for each, though L2 serves all but the first. Of launches of many alike programs a
sample is run, and scaled.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton.runtime import interpreter as stock

ALL_PROGRAMS = 64  # of a launch: up to so many are all run
SAMPLED_PROGRAMS = 5
# Scratch memory is moved by choice, not by need.
SCRATCH = {"squares_ptr", "y_squares_ptr", "mixed_ptr", "maxima_ptr", "totals_ptr", "counters_ptr"}
SCRATCH |= {"first_ids_ptr", "sums_ptr", "masses_ptr", "candidates_ptr", "counts_ptr", "lowest_ptr"}


class Traffic(NamedTuple):
    """One launch."""

    kernel: str
    moved: dict[str, int]  # bytes by argument
    arguments: dict[str, Any]


@contextmanager
def counted() -> Iterator[list[Traffic]]:
    """Within the block launches are counted; of large ones only a sample of programs runs, so results are not to be
    read.

    RuntimeError in a process whose kernels are compiled.
    """
    if not stock.triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are compiled in this process: start it with TRITON_INTERPRET=1 to count bytes")
    launches: list[Traffic] = []
    builder = stock.InterpreterBuilder
    before = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store")}
    execute, restore = stock.GridExecutor.__call__, stock.GridExecutor._restore_args_dev
    counter = _Counter()

    def load(self: Any, pointers: Any, mask: Any, *how: Any) -> Any:
        counter.add(pointers, mask)
        return before["create_masked_load"](self, pointers, mask, *how)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        counter.add(pointers, mask)
        return before["create_masked_store"](self, pointers, value, mask, *how)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        counter.begin(arguments)
        with warnings.catch_warnings():  # what programs that were left out did not write may be anything
            warnings.simplefilter("ignore", RuntimeWarning)
            share = _run_sample(self, lambda: execute(self, *args, **kwargs))
        moved = {name: round(n_bytes / share) for name, n_bytes in counter.moved.items()}
        launches.append(Traffic(self.fn.__name__, moved, arguments))

    builder.create_masked_load, builder.create_masked_store = load, store
    stock.GridExecutor.__call__ = call
    stock.GridExecutor._restore_args_dev = lambda self, *arguments: None  # it would touch every page of every weight
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store = before.values()
        stock.GridExecutor.__call__, stock.GridExecutor._restore_args_dev = execute, restore


def least_bytes(traffic: Traffic, live_bytes: dict[str, int]) -> int:
    """Bytes that the op must move: each argument once, or `live_bytes` of those of which only a part is meant."""
    total = 0
    for name, tensor in traffic.arguments.items():
        if isinstance(tensor, Tensor) and name not in SCRATCH:
            total += live_bytes.get(name, tensor.nbytes)
    return total


class _Counter:
    """Bytes by argument, of one launch."""

    def __init__(self) -> None:
        self.moved: Counter[str] = Counter()
        self._spans: list[tuple[int, int, str]] = []

    def begin(self, arguments: dict[str, Any]) -> None:
        self.moved = Counter()
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        self._spans = [(t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in tensors.items()]

    def add(self, pointers: Any, mask: Any) -> None:
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        if live.any():
            address = int(pointers.data[live].flat[0])
            name = next(name for begin, end, name in self._spans if begin <= address < end)
            self.moved[name] += int(live.sum()) * pointers.get_element_ty().primitive_bitwidth // 8


def _run_sample(executor: Any, run: Any) -> float:
    """Run some of a launch's programs -> which share of all that was."""
    grid = tuple(executor.grid) + (1,) * (3 - len(executor.grid))
    everyone = list(product(*(range(size) for size in grid)))
    sample = everyone
    if len(everyone) > ALL_PROGRAMS:  # one kv head's, where the second dimension counts those
        sample = [place for place in everyone if place[1] == 0]
    if len(sample) > ALL_PROGRAMS:
        sample = [sample[index * (len(sample) - 1) // (SAMPLED_PROGRAMS - 1)] for index in range(SAMPLED_PROGRAMS)]
    builder = stock.interpreter_builder
    place, size = builder.set_grid_idx, builder.set_grid_dim
    builder.set_grid_idx = lambda x, y, z: place(*sample[x])
    builder.set_grid_dim = lambda *_: size(*grid)
    executor.grid = (len(sample),)
    try:
        run()
    finally:
        del builder.set_grid_idx, builder.set_grid_dim
    return len(sample) / len(everyone)
