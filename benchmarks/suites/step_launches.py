"""How long each launch of a decode step takes, beside the least time that it could take (`fastllama.speed_of_light`).

A step runs once and its calls of the backend are kept, each with its own layer's tensors. Then all calls of one kind
follow each other, layer after layer, so that what a layer reads has left the caches by the time its turn comes again,
as in a step; where all layers together fit a cache (a short context's keys and values), it has not, in neither. On CUDA
they follow each other in a graph, and the time of one has a boundary between two launches in it. Where processes share
the model all of them do this together; the launches are this one's, and what they exchange comes last.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from fastllama.benchmarks.statistics import MICRO, Summary, summarize
from fastllama.benchmarks.tables import Table
from fastllama.benchmarks.timing import replayed, time_calls
from fastllama.decode_graph import step
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import DecodeState
from fastllama.model import Transformer
from fastllama.speed_of_light import Machine, Work, decode_step

REPEATS = 10
CUDA_CHAIN = 16  # calls of one graph, at least: beside them its own launch is small
TOP_P = 0.9
LAUNCHES_OF_A_CALL = {"sampling": 2}  # of the others' one
# The calls of the backend by the names that the speed of light has for their launches.
NAMES = {
    "embed": "embed",
    "norm_qkv_rope_append": "qkv",
    "attention": "attention",
    "norm_swiglu": "gate+up",
    "norm_lm_head": "head",
}
PROJECTIONS = {"attention": "output", "gate+up": "down"}  # by what comes before them


@dataclass(frozen=True)
class LaunchTime:
    """One kind of launch of a step, and the µs that one of them took."""

    work: Work
    microseconds: Summary

    def against(self, machine: Machine | None) -> dict[str, Any]:
        """Beside the least that it could take, ready for JSON. `share` is 1 at the limit, 0 where there is none.

        Both are None where nothing is known of the machine.
        """
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
    """Stands where a model's backend stands, and keeps every call."""

    def __init__(self, ops: Any, spare_steps: int) -> None:
        self._ops, self._spare_steps = ops, spare_steps
        self.calls: list[_Call] = []

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return partial(self._call, op)

    def _call(self, op: str, *arguments: Any) -> Any:
        function = getattr(self._ops, op)
        if op == "sample_and_advance":
            logits, state, workspace = arguments
            # The step's own rows stay where the other calls found them.
            run = partial(function, logits, _long_lasting(state, self._spare_steps), workspace)
            self.calls.append(_Call("sampling", run))
            return run()
        name = NAMES.get(op) or PROJECTIONS[self.calls[-1].name]
        self.calls.append(_Call(name, partial(function, *arguments)))
        return function(*arguments)


def _long_lasting(state: DecodeState, n_steps: int) -> DecodeState:
    """The state for a call that moves it on, so many times over, in memory of its own."""
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
    """The launches of a decode step of the first `batch` rows, each over `context` positions, in order.

    Fills those rows of the cache with random numbers. Raises ValueError for rows or positions that the cache has not,
    RuntimeError while a call or an open stream holds the model.
    """
    cache = model.cache
    if not (1 <= batch <= cache.max_batch_size and 1 <= context <= cache.max_seq_len):
        raise ValueError(
            f"the cache has {cache.max_batch_size} rows of {cache.max_seq_len} positions, asked for were {batch} of "
            f"{context}"
        )
    with model.exclusively():
        calls = _recorded(model, batch, context, temperature, spare_steps=_chain(model.device, 1) * (repeats + 4))
        work = decode_step(model.share, model.dtype, batch, context)
        for one, call in _collectives(model, batch):
            work.append(one)
            calls.append(_Call(one.name, call))
        return [_timed(one, calls, model.device, repeats) for one in work]


def _collectives(model: Transformer, batch: int) -> list[tuple[Work, Callable[[], object]]]:
    """Those of a step, whose least time is not known from bytes, and a call of each."""
    if model.group.size == 1:
        return []
    zeros = partial(torch.zeros, dtype=model.dtype, device=model.device)
    hidden, logits = zeros(batch, model.params.dim), zeros(batch, model.share.vocab_size)
    return [
        (Work("all-reduce", 2 * model.n_layers + 1, 0, 0), partial(model.group.all_reduce, hidden)),
        (Work("all-gather", 1, 0, 0), partial(model.group.all_gather, logits)),
    ]


def fill_cache(model: Transformer, batch: int, context: int) -> None:
    """Random numbers where the first rows' keys and values stand: zeros would cost less power, and so less time."""
    for cached in (model.cache.k, model.cache.v):
        for layer in cached:
            layer[:batch, :, :context].normal_()


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
        # A backend that runs eagerly reads no more of the cache than it is told.
        lengths = None if ops.supports_cuda_graphs(model.device) else [context] * batch
        step(model, state.with_greedy(greedy=sampling.greedy), lengths)
    finally:
        model.ops = ops
    return recorder.calls


def _timed(work: Work, calls: Sequence[_Call], device: torch.device, repeats: int) -> LaunchTime:
    mine = [call.run for call in calls if call.name == work.name]
    chain = mine * _chain(device, len(mine))

    def run() -> None:
        for call in chain:
            call()

    times = time_calls(replayed(run, device), device=device, repeats=repeats)
    launches = len(chain) * LAUNCHES_OF_A_CALL.get(work.name, 1)
    return LaunchTime(work, summarize(MICRO * seconds / launches for seconds in times))


def _chain(device: torch.device, n_calls: int) -> int:
    """How often to go through n_calls in one graph."""
    return -(-CUDA_CHAIN // n_calls) if device.type == "cuda" else 1


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One line for each record's "launches": µs of one of each kind, and the share of the speed of light."""
    first = records[0]["launches"]
    head = ["batch", "context", *(f"{one['launch']} x{one['count']}" for one in first), "all, ms", "least, ms"]
    rows = [
        [record["batch"], record["context"], *map(_cell, record["launches"]), *map(_milliseconds, _sums(record))]
        for record in records
    ]
    return Table(head, rows)


def _cell(launch: dict[str, Any]) -> str:
    microseconds = launch["microseconds"]["p50"]
    share = f" {launch['share']:.0%}" if launch["least_microseconds"] else ""
    return f"{microseconds:.{0 if microseconds >= 100 else 1}f}{share}"


def _sums(record: dict[str, Any]) -> tuple[float, float]:
    """(measured, least) µs of all launches of a step."""
    launches = record["launches"]
    return (
        sum(one["count"] * one["microseconds"]["p50"] for one in launches),
        sum(one["count"] * one["least_microseconds"] for one in launches),
    )


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1e3:.2f}"
