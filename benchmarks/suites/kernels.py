"""The kernels suite: every op by ours, the reference, torch.compile and the library, compared and then timed in rounds.

Caches are flushed before each timing, and a timing uses several copies of the inputs in turn, so that they come from
memory as in a step. On CUDA all launches are replayed from a graph: the host's time does not count.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastllama.benchmarks.ceilings import AdjacentSamples, Probes, machine_of
from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.result_file import one_line
from fastllama.benchmarks.runners import OURS
from fastllama.benchmarks.statistics import MICRO, percentile, summarize
from fastllama.benchmarks.suites.interleaved import Progress, measured_peers, rounds_in_turn
from fastllama.benchmarks.suites.op_cases import TEMPERATURE, TOP_P, Inputs, Op, Output, compiled
from fastllama.benchmarks.tables import Columns
from fastllama.benchmarks.timing import CacheFlush, Contention, replayed, time_calls
from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import reference, select
from fastllama.kernels.batch import Workspace

COPIES_BYTES = 256 * 2**20  # of all copies of an op's inputs, which are at most MAX_COPIES
MAX_COPIES = 16
REPEATS = 3  # timings of a round
NUCLEUS_SLACK = 1e-6  # of probability mass: the precision of float32 sums
REFERENCE, COMPILED, LIBRARY = "reference", "torch-compile", "library"

COLUMNS: Columns = {
    "op": itemgetter("op"),
    "batch": itemgetter("batch"),
    "context": lambda record: record["context"] or "-",
    "µs p50": lambda record: f"{record['microseconds']['p50']:.1f}",
    "% of light": lambda record: f"{record['share']:.0%}" if record["least_microseconds"] else "-",
}
Calls = list[Callable[[], Output]]  # one for each copy of the inputs


@dataclass
class Bench:
    """What all ops of one run share."""

    model: ModelSpec
    rounds: int
    probes: Probes

    def __post_init__(self) -> None:
        self.device = self.model.device
        self.backend = self.model.backend_name
        self.ops = select.backend(self.backend, self.device)
        self.flush = CacheFlush(self.device)

    @property
    def interpreted(self) -> bool:
        return self.backend == "fused" and self.device.type == "cpu"

    def copies(self, op: Op) -> list[Inputs]:
        first = op.inputs(0)
        count = min(MAX_COPIES, -(-COPIES_BYTES // first.n_bytes))
        return [first, *(op.inputs(copy) for copy in range(1, count))]


class WrongOutput(Exception):
    """An implementation's output differs from the reference's."""


@torch.inference_mode()
def measure_op(op: Op, bench: Bench, progress: Progress) -> dict[str, Any]:
    """The record of one op: ours, and as peers the reference backend, torch.compile of it, and the library."""
    inputs = bench.copies(op)
    found = {"op": op.name, "backend": bench.backend, "interpreted": bench.interpreted, "copies": len(inputs)}
    peers: dict[str, dict[str, Any]] = {}
    working: dict[str, Calls] = {}
    for name, make in implementations(op, bench, inputs).items():
        progress(f"comparing {name}")
        try:
            working[name] = verified_calls(op, inputs, make)
            peers[name] = {"status": "measured"}
        except WrongOutput as error:
            peers[name] = {"status": "disagrees", "reason": f"{op.name}: {error}"}
        except Exception as error:  # a compiler or a library may raise anything
            peers[name] = {"status": "failed", "reason": f"{op.name}: {one_line(error)}"}
    ours = peers.pop(OURS)
    if OURS not in working:
        reason = f"{OURS} {ours['status']}: {ours['reason']}"
        return found | {"not_run": reason, "status": ours["status"], "other_cores": 0.0, "peers": peers}
    if bench.interpreted:
        reason = f"{op.name}: outputs compared; times of interpreted kernels mean nothing"
        return found | {"not_run": reason, "status": "measured", "other_cores": 0.0, "peers": peers}
    return found | _timed(op, bench, working, peers, progress)


def implementations(op: Op, bench: Bench, inputs: Sequence[Inputs]) -> dict[str, Callable[[], Calls]]:
    """Ours and its peers by name: functions that make one call for each copy of the inputs."""

    def of_backend(ops: Any) -> Calls:
        return [partial(op.spec.call, ops, op.for_backend(ops, one, bench.model.args)) for one in inputs]

    def of_compiler() -> Calls:
        ops = compiled(reference)  # with row-major weights, the only layout that the compiler knows
        plain = [replace(one, batch=replace(one.batch, workspace=Workspace())) for one in inputs]
        for one in plain:
            _ = one.batch.is_decode_step  # cached here: the compiler cannot trace the lock of a cached property
        return [partial(op.spec.call, ops, one) for one in plain]

    found: dict[str, Callable[[], Calls]] = {OURS: partial(of_backend, bench.ops)}
    if bench.ops is not reference:
        found[REFERENCE] = partial(of_backend, reference)
    found[COMPILED] = of_compiler
    found[LIBRARY] = lambda: [partial(op.spec.library, one) for one in inputs]
    return found


def verified_calls(op: Op, inputs: Sequence[Inputs], make: Callable[[], Calls]) -> Calls:
    """Make the calls, compile them and check their output. WrongOutput if it differs from the reference's."""
    op.clear_appended(inputs[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compilers warn about speed and internals
        calls = make()
        output = calls[0]()
    if op.samples:
        for one, call in zip(inputs, calls, strict=True):
            check_draw(one, *call())
        return calls
    found = [tensor.clone() for tensor in op.results(inputs[0], output)]  # the next call writes the same cache
    expected = op.results(inputs[0], op.spec.call(reference, inputs[0]))
    for tensor, wanted in zip(found, expected, strict=True):
        if tensor.shape != wanted.shape:
            raise WrongOutput(f"shape {tuple(tensor.shape)} instead of {tuple(wanted.shape)}")
        _compare(op.spec.tolerance, tensor, wanted)
    return calls


def _compare(tolerance: str, ours: Tensor, expected: Tensor) -> None:
    try:
        assert_matches(tolerance, ours, expected)
    except AssertionError as error:
        raise WrongOutput(one_line(error)) from None


def check_draw(inputs: Inputs, tokens: Tensor, logprobs: Tensor) -> None:
    """WrongOutput for a token that top-p or the argmax cannot choose, or for a wrong log-probability."""
    logits = inputs.x
    allowed = logits == logits.amax(-1, keepdim=True)
    if not inputs.sampling.greedy:
        probs = torch.softmax(logits.double() / TEMPERATURE, -1)
        ordered, ids = probs.sort(stable=True, dim=-1, descending=True)
        before = torch.zeros_like(probs).scatter(-1, ids, ordered.cumsum(-1) - ordered)
        allowed = before <= TOP_P + NUCLEUS_SLACK
    outside = ~allowed.gather(-1, tokens[:, None])[:, 0]
    if outside.any():
        row = int(outside.int().argmax())
        raise WrongOutput(f"row {row}: token {int(tokens[row])} cannot be chosen")
    _compare("sample", logprobs, torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, None])[:, 0])


def _timed(
    op: Op, bench: Bench, working: dict[str, Calls], peers: dict[str, dict[str, Any]], progress: Progress
) -> dict[str, Any]:
    """Time the implementations in rounds. Returns the figures for the record."""
    contention = Contention()
    runs: dict[str, Callable[[], object]] = {}
    for name, calls in working.items():
        try:
            runs[name] = replayed(partial(call_all, calls), bench.device)
        except Exception as error:  # some calls of peers cannot be captured
            if name == OURS:
                raise
            peers[name] = {"status": "failed", "reason": f"{op.name} in a CUDA graph: {one_line(error)}"}
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}  # µs of one call, for each round
    read, matmul = AdjacentSamples(bench.probes.read), AdjacentSamples(bench.probes.matmul)
    for index, names in rounds_in_turn(runs, bench.rounds):
        progress(f"round {index}/{bench.rounds}")
        for name in names:
            times = time_calls(runs[name], device=bench.device, warmup=1, repeats=REPEATS, before=bench.flush)
            samples[name].append([MICRO * second / len(working[name]) for second in times])
    machine = machine_of(read.higher(), matmul.higher())
    least = MICRO * op.work.least_seconds(machine)

    def figures(name: str) -> dict[str, Any]:
        flat = [one for of_round in samples[name] for one in of_round]
        return {"microseconds": asdict(summarize(flat)), "share": least / percentile(flat, 50)}

    medians = {name: [percentile(one, 50) for one in of_rounds] for name, of_rounds in samples.items()}
    work = {"bytes": op.work.bytes, "flops": op.work.flops, "least_microseconds": least}
    return work | figures(OURS) | {"other_cores": contention.cores(), "peers": measured_peers(peers, figures, medians)}


def call_all(calls: Calls) -> None:
    for call in calls:
        call()
