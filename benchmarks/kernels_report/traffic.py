"""Counts the bytes that launches move, argument by argument, in the interpreter.

It counts the elements that programs request: those of each load and store that the mask allows. A vector that every
program reads counts once for each program, though L2 serves all but the first. If a launch has many similar programs,
only a sample of them runs, and its bytes are scaled.
"""

import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton.runtime import interpreter as stock

ALL_PROGRAMS = 64  # launches of at most this many programs run completely
SAMPLED_PROGRAMS = 3  # between the first and the last
# Scratch memory. It does not count as necessary traffic.
SCRATCH = {"acc_ptr", "score_max_ptr", "p_sum_ptr", "counters_ptr"}
SCRATCH |= {"maxima_ptr", "first_ids_ptr", "sums_ptr", "masses_ptr", "candidates_ptr", "counts_ptr", "lowest_ptr"}

Place = tuple[int, int, int]  # of a program in its grid


class Traffic(NamedTuple):
    """The traffic of one launch."""

    kernel: str
    moved: dict[str, int]  # bytes by argument
    arguments: dict[str, Any]


@contextmanager
def count_traffic() -> Iterator[list[Traffic]]:
    """Within the block, the traffic of each launch is appended to the list. Large launches run only in part, so their
    results are wrong.

    RuntimeError in a process whose kernels are compiled.
    """
    if not stock.triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are compiled in this process: start it with TRITON_INTERPRET=1 to count bytes")
    launches: list[Traffic] = []
    builder = stock.InterpreterBuilder
    before = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store")}
    execute, restore = stock.GridExecutor.__call__, stock.GridExecutor._restore_args_dev
    counter = _Counter()

    def load(self: Any, pointers: Any, mask: Any, *options: Any) -> Any:
        counter.add(pointers, mask)
        return before["create_masked_load"](self, pointers, mask, *options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        counter.add(pointers, mask)
        return before["create_masked_store"](self, pointers, value, mask, *options)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        counter.begin(arguments)
        with warnings.catch_warnings():  # memory that skipped programs should have written holds any values
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
    """The bytes that a launch must move: each argument once, completely or the number of bytes in `live_bytes`.

    only: count only these arguments.
    """
    return sum(
        live_bytes.get(name, tensor.nbytes)
        for name, tensor in traffic.arguments.items()
        if isinstance(tensor, Tensor) and name not in SCRATCH and (only is None or name in only)
    )


class _Counter:
    """The bytes of one launch by argument."""

    def __init__(self) -> None:
        self.moved: dict[str, float] = {}
        self.weight = 1.0  # the number of programs that the running one represents
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


def sample(grid: tuple[int, ...], options: dict[str, Any]) -> list[tuple[Place, float]]:
    """A sample of a launch's programs: (place in the grid, number of programs that it represents) of each.

    A small launch runs completely. In a larger one, only the programs of the first row (sampling counts its blocks row
    by row) or of the first kv head (attention's second dimension) run. If these are too many, the first and the last
    run, which may cross an edge, and some in between.
    """
    x, y, z = (*grid, 1, 1)[:3]
    places = list(product(range(x), range(y), range(z)))
    similar = places
    if len(places) > ALL_PROGRAMS:
        similar = [place for place in places if place[0] < options.get("BLOCKS", x) and place[1] == 0]
    share = len(places) / len(similar)
    if len(similar) <= ALL_PROGRAMS:
        return [(place, share) for place in similar]
    inner = similar[1:-1]
    middle = [inner[index * (len(inner) - 1) // (SAMPLED_PROGRAMS - 1)] for index in range(SAMPLED_PROGRAMS)]
    ends = [(similar[0], share), (similar[-1], share)]
    return ends + [(place, share * len(inner) / len(middle)) for place in middle]


def _run_sample(executor: Any, places: list[tuple[Place, float]], counter: _Counter, run: Callable[[], None]) -> None:
    """Run only these programs of a launch."""
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
