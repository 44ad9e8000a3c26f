"""The time of each launch of a decode step, and the least time that it could take (`fastllama.speed_of_light`).

A step runs once, and its calls of the backend are recorded, each with the tensors of its layer. Then all calls of one
kind run one after another, layer by layer. As in a step, a layer's data has left the caches before it is read again,
unless all layers fit in a cache (keys and values of a short context). On CUDA the calls are in one graph, and the time
of a launch includes the boundary to the next. If processes share the model, all of them run this together. The launches
are those of this process; the collectives come last.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch

from fastllama.benchmarks.statistics import MICRO, MILLI, Summary, summarize
from fastllama.benchmarks.tables import Columns, Record
from fastllama.benchmarks.timing import replayed, time_calls
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.paged_cache import pages_for
from fastllama.model import Transformer
from fastllama.speed_of_light import Machine, Work, decode_step
from fastllama.step_graphs import step

REPEATS = 10
MIN_CALLS_PER_GRAPH = 16  # enough to make the launch of the graph itself negligible
TOP_P = 0.9
LAUNCHES_PER_CALL = {"sampling": 2}  # 1 for all other kinds
# The backend's functions -> the names of their launches in fastllama.speed_of_light.
NAMES = {
    "embed": "embed",
    "norm_qkv_rope_append": "qkv",
    "attention": "attention",
    "norm_swiglu": "gate+up",
    "norm_lm_head": "head",
}
PROJECTIONS = {"attention": "output", "gate+up": "down"}  # the launch before linear_residual -> its name


@dataclass(frozen=True)
class LaunchTime:
    """One kind of launch of a step, and the µs of one launch."""

    work: Work
    microseconds: Summary

    def against(self, machine: Machine | None) -> dict[str, Any]:
        """The measured and the least time, as JSON. `share` is 1 at the limit. Without a machine, both are None."""
        least = None if machine is None else MICRO * self.work.least_seconds(machine)
        return {
            "launch": self.work.name,
            "count": self.work.count,
            "bytes": self.work.bytes,
            "flops": self.work.flops,
            "microseconds": asdict(self.microseconds),
            "least_microseconds": least,
            "share": None if least is None else least / self.microseconds.p50,
        }


class _Call(NamedTuple):
    name: str
    run: Callable[[], object]


class _Recorder:
    """Replaces a model's backend and records every call."""

    def __init__(self, ops: Any, spare_steps: int) -> None:
        self._ops, self._spare_steps = ops, spare_steps
        self.calls: list[_Call] = []

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return partial(self._call, op)

    def _call(self, op: str, *arguments: Any) -> Any:
        function = getattr(self._ops, op)
        if op == "sample_and_advance":
            logits, state, workspace = arguments
            # Repeated calls advance a copy of the state, so the step's rows stay at their positions.
            run = partial(function, logits, _with_spare_steps(state, self._spare_steps), workspace)
            self.calls.append(_Call("sampling", run))
            return run()
        name = NAMES.get(op) or PROJECTIONS[self.calls[-1].name]
        self.calls.append(_Call(name, partial(function, *arguments)))
        return function(*arguments)


def _with_spare_steps(state: DecodeState, n_steps: int) -> DecodeState:
    """A copy of the state that a call can advance n_steps times."""
    shape = (n_steps, state.rows.shape[0])
    return replace(
        state,
        tokens=state.tokens.clone(),
        positions=state.positions.clone(),
        last=state.last + n_steps,
        out_tokens=state.out_tokens.new_zeros(shape),
        out_logprobs=state.out_logprobs.new_zeros(shape),
    )


@torch.inference_mode()
def launch_times(
    model: Transformer, batch: int, context: int, *, temperature: float = 0.0, repeats: int = REPEATS
) -> list[LaunchTime]:
    """The launches of a decode step of the first `batch` rows over `context` positions each, in order.

    Overwrites those rows' pages of the cache with random numbers. Raises ValueError for more rows or positions than the
    cache has, RuntimeError while a call or an open stream uses the model.
    """
    cache = model.cache
    if not (1 <= batch <= cache.max_batch_size and 1 <= context <= cache.max_seq_len):
        raise ValueError(
            f"the cache has {cache.max_batch_size} rows of {cache.max_seq_len} positions, got {batch} rows of {context}"
        )
    with model.exclusively():
        calls = _recorded(
            model, batch, context, temperature, spare_steps=_rounds_per_graph(model.device, 1) * (repeats + 4)
        )
        work = decode_step(model.share, model.dtype, batch, context, model.schemes)
        for one, call in _collectives(model, batch):
            work.append(one)
            calls.append(_Call(one.name, call))
        return [_timed(one, calls, model.device, repeats) for one in work]


def _collectives(model: Transformer, batch: int) -> list[tuple[Work, Callable[[], object]]]:
    """The collectives of a step, with a call of each. They have no least time."""
    if model.group.size == 1:
        return []
    zeros = partial(torch.zeros, dtype=model.dtype, device=model.device)
    hidden, logits = zeros(batch, model.params.dim), zeros(batch, model.share.vocab_size)
    return [
        (Work("all-reduce", 2 * model.n_layers + 1, 0, 0), partial(model.group.all_reduce, hidden)),
        (Work("all-gather", 1, 0, 0), partial(model.group.all_gather, logits)),
    ]


def fill_cache(model: Transformer, batch: int, context: int) -> None:
    """Give the first rows pages, and fill those with random numbers: with zeros a GPU uses less power and is faster."""
    model.cache.extend([context] * batch)
    pages = model.cache.table[:batch, : pages_for(context)].flatten()
    for cached in (model.cache.k, model.cache.v):
        for layer in cached:
            layer[pages] = torch.randn(len(pages), *layer.shape[1:], dtype=layer.dtype, device=layer.device)


def _recorded(model: Transformer, batch: int, context: int, temperature: float, spare_steps: int) -> list[_Call]:
    fill_cache(model, batch, context)
    state = DecodeState.of(batch, 1, model.vocab_size, model.device)
    sampling = SamplingTensors.of(temperature, TOP_P, [(1, row, 0) for row in range(batch)], model.device)
    tokens = torch.randint(model.vocab_size, (batch,), generator=torch.Generator().manual_seed(1)).tolist()
    state.set(tokens, [context - 1] * batch, [context] * batch, [], sampling)
    ops = model.ops
    recorder = _Recorder(ops, spare_steps)
    model.ops = cast(Any, recorder)
    try:
        # An eager backend reads the cache only up to these lengths.
        lengths = None if ops.supports_cuda_graphs(model.device) else [context] * batch
        step(model, state.with_greedy(greedy=sampling.greedy), lengths)
    finally:
        model.ops = ops
    return recorder.calls


def _timed(work: Work, calls: Sequence[_Call], device: torch.device, repeats: int) -> LaunchTime:
    of_kind = [call.run for call in calls if call.name == work.name]
    sequence = of_kind * _rounds_per_graph(device, len(of_kind))

    def run() -> None:
        for call in sequence:
            call()

    times = time_calls(replayed(run, device), device=device, repeats=repeats)
    launches = len(sequence) * LAUNCHES_PER_CALL.get(work.name, 1)
    return LaunchTime(work, summarize(MICRO * seconds / launches for seconds in times))


def _rounds_per_graph(device: torch.device, n_calls: int) -> int:
    """How many times n_calls are repeated in one graph."""
    return -(-MIN_CALLS_PER_GRAPH // n_calls) if device.type == "cuda" else 1


def columns(records: Sequence[Record]) -> Columns:
    """Columns for records with "launches": one for each kind of launch, and the sums over a step."""
    kinds = {f"{one['launch']} x{one['count']}": index for index, one in enumerate(records[0]["launches"])}
    return {
        "batch": itemgetter("batch"),
        "context": itemgetter("context"),
        **{head: partial(_cell, index) for head, index in kinds.items()},
        "all, ms": lambda record: _sum_ms(one["count"] * one["microseconds"]["p50"] for one in record["launches"]),
        "least, ms": lambda record: _sum_ms(one["count"] * one["least_microseconds"] for one in record["launches"]),
    }


def _cell(index: int, record: Record) -> str:
    """µs of one launch of a kind, and its share of the speed of light."""
    launch = record["launches"][index]
    microseconds = launch["microseconds"]["p50"]
    share = f" {launch['share']:.0%}" if launch["least_microseconds"] else ""
    return f"{microseconds:.{0 if microseconds >= 100 else 1}f}{share}"


def _sum_ms(microseconds: Iterable[float]) -> str:
    return f"{sum(microseconds) * MILLI / MICRO:.2f}"
