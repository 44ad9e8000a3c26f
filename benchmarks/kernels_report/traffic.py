"""Bytes that launches move, counted argument by argument in the interpreter.

What is counted is what programs request: the elements of each load and store that its mask lets through. A vector that
every program reads counts once for each, though L2 serves all but the first. Of launches of many alike programs a
sample is run, and scaled.
"""

import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton.runtime import interpreter as stock

ALL_PROGRAMS = 64  # of a launch: up to so many are all run
SAMPLED_PROGRAMS = 3  # between the first and the last
# Scratch memory is moved by choice, not by need.
SCRATCH = {"acc_ptr", "score_max_ptr", "p_sum_ptr", "counters_ptr"}
SCRATCH |= {"maxima_ptr", "first_ids_ptr", "sums_ptr", "masses_ptr", "candidates_ptr", "counts_ptr", "lowest_ptr"}


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
            _run_sample(self, sample(self.grid, kwargs), counter, lambda: execute(self, *args, **kwargs))
        moved = {name: round(n_bytes) for name, n_bytes in counter.moved.items()}
        launches.append(Traffic(self.fn.__name__, moved, arguments))

    builder.create_masked_load, builder.create_masked_store = load, store
    stock.GridExecutor.__call__ = call
    stock.GridExecutor._restore_args_dev = lambda self, *arguments: None  # it would touch every page of every weight
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store = before.values()
        stock.GridExecutor.__call__, stock.GridExecutor._restore_args_dev = execute, restore


def least_bytes(traffic: Traffic, live_bytes: dict[str, int], only: Container[str] | None = None) -> int:
    """Bytes that the op must move: each argument once, or `live_bytes` of those of which only a part is meant.

    only: of these arguments alone.
    """
    total = 0
    for name, tensor in traffic.arguments.items():
        if isinstance(tensor, Tensor) and name not in SCRATCH and (only is None or name in only):
            total += live_bytes.get(name, tensor.nbytes)
    return total


class _Counter:
    """Bytes by argument, of one launch."""

    def __init__(self) -> None:
        self.moved: dict[str, float] = {}
        self.weight = 1.0  # programs that the one that runs stands for
        self._spans: list[tuple[int, int, str]] = []

    def begin(self, arguments: dict[str, Any]) -> None:
        self.moved = {}
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        self._spans = [(t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in tensors.items()]

    def add(self, pointers: Any, mask: Any) -> None:
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        if live.any():
            address = int(pointers.data[live].flat[0])
            name = next(name for begin, end, name in self._spans if begin <= address < end)
            n_bytes = int(live.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            self.moved[name] = self.moved.get(name, 0.0) + self.weight * n_bytes


def sample(grid: tuple[int, ...], options: dict[str, Any]) -> list[tuple[tuple[int, int, int], float]]:
    """Programs of a launch that stand for all: (place in the grid, programs it stands for) of each.

    All programs of a small launch. Of a larger one those of the first row (sampling counts its blocks row by row) or of
    the first kv head (attention's second dimension); of very many the first and the last, which may hang over an edge,
    and some between.
    """
    x, y, z = (*grid, 1, 1)[:3]
    everyone = list(product(range(x), range(y), range(z)))
    alike = everyone
    if len(everyone) > ALL_PROGRAMS:
        alike = [place for place in everyone if place[0] < options.get("BLOCKS", x) and place[1] == 0]
    if len(alike) <= ALL_PROGRAMS:
        return [(place, len(everyone) / len(alike)) for place in alike]
    inner = alike[1:-1]
    middle = [inner[index * (len(inner) - 1) // (SAMPLED_PROGRAMS - 1)] for index in range(SAMPLED_PROGRAMS)]
    share = len(everyone) / len(alike)
    ends = [(alike[0], share), (alike[-1], share)]
    return ends + [(place, share * len(inner) / len(middle)) for place in middle]


def _run_sample(
    executor: Any, places: list[tuple[tuple[int, int, int], float]], counter: _Counter, run: Callable[[], None]
) -> None:
    """Run these of a launch's programs."""
    grid = (*executor.grid, 1, 1)[:3]
    builder = stock.interpreter_builder
    set_place, set_size = builder.set_grid_idx, builder.set_grid_dim

    def set_sampled_place(x: int, y: int, z: int) -> None:
        place, counter.weight = places[x]
        set_place(*place)

    builder.set_grid_idx, builder.set_grid_dim = set_sampled_place, lambda *_: set_size(*grid)
    executor.grid = (len(places),)
    try:
        run()
    finally:
        del builder.set_grid_idx, builder.set_grid_dim
