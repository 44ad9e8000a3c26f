"""Every op against others' ways to do the same: the kernels suite. Outputs are compared first, then rounds in turn.

Caches are flushed before each timing, and copies of all that an op reads take turns within one, so that it comes from
memory as it does in a step. On CUDA everybody's launches are replayed from a graph: nobody's host time counts.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.benchmarks.ceilings import MatmulProbe, ReadProbe
from fastllama.benchmarks.peer_table import Columns
from fastllama.benchmarks.peers.client import one_line
from fastllama.benchmarks.runner import OURS
from fastllama.benchmarks.statistics import GIGA, MICRO, TERA, percentile, summarize
from fastllama.benchmarks.suites.comparison import Progress
from fastllama.benchmarks.suites.op_cases import TEMPERATURE, TOP_P, Inputs, Op, Output, compiled, workspace
from fastllama.benchmarks.timing import CacheFlush, Contention, replayed, time_calls
from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import reference, select
from fastllama.kernels.batch import Workspace
from fastllama.speed_of_light import Machine

ROTATED_BYTES = 256 * 2**20  # that the copies of an op's inputs come to, but for
MAX_COPIES = 16
REPEATS = 3  # timings of a round
NUCLEUS_SLACK = 1e-6  # of probability mass, which float32 sums decide no finer
REFERENCE, COMPILED, LIBRARY = "reference", "torch-compile", "library"

COLUMNS: Columns = {
    "op": lambda record: record["op"],
    "batch": lambda record: record["batch"],
    "context": lambda record: record["context"] or "-",
    "µs p50": lambda record: f"{record['microseconds']['p50']:.1f}",
    "% of light": lambda record: f"{record['share']:.0%}" if record["least_microseconds"] else "-",
}
Calls = list[Callable[[], Output]]  # one for each copy of the inputs


@dataclass
class Bench:
    """What all ops of one run share. backend: "fused" or "reference", which is ours."""

    args: ModelArgs
    device: torch.device
    dtype: torch.dtype
    backend: str
    rounds: int
    probe: ReadProbe
    matmul: MatmulProbe

    def __post_init__(self) -> None:
        self.ops = select.backend(self.backend, self.device)
        self.flush = CacheFlush(self.device)

    @property
    def interpreted(self) -> bool:
        return self.backend == "fused" and self.device.type == "cpu"

    def copies(self, op: Op) -> list[Inputs]:
        first = op.inputs(0)
        count = min(MAX_COPIES, -(-ROTATED_BYTES // first.n_bytes))
        return [first, *(op.inputs(copy) for copy in range(1, count))]


class Difference(Exception):
    """A way's output is not the op's."""


@torch.inference_mode()
def measure(op: Op, bench: Bench, batch: int, progress: Progress) -> dict[str, Any]:
    """The record of one op: ours, and as peers the reference backend, the same compiled, and the library."""
    inputs = bench.copies(op)
    found = {"op": op.name, "backend": bench.backend, "interpreted": bench.interpreted, "copies": len(inputs)}
    peers: dict[str, dict[str, Any]] = {}
    alive: dict[str, Calls] = {}
    for name, make in ways(op, bench, inputs, batch).items():
        progress(f"comparing {name}")
        try:
            alive[name] = checked(op, inputs, make)
            peers[name] = {"status": "measured"}
        except Difference as error:
            peers[name] = {"status": "disagrees", "reason": f"{op.name}: {error}"}
        except Exception as error:  # whatever a compiler or a library may raise: the others go on
            peers[name] = {"status": "failed", "reason": f"{op.name}: {one_line(error)}"}
    ours = peers.pop(OURS)
    if OURS not in alive:
        reason = f"{OURS} {ours['status']}: {ours['reason']}"
        return found | {"not_run": reason, "status": ours["status"], "other_cores": 0.0, "peers": peers}
    if bench.interpreted:
        reason = f"{op.name}: outputs compared; times of interpreted kernels mean nothing"
        return found | {"not_run": reason, "status": "measured", "other_cores": 0.0, "peers": peers}
    return found | _timed(op, bench, alive, peers, progress)


def ways(op: Op, bench: Bench, inputs: Sequence[Inputs], batch: int) -> dict[str, Callable[[], Calls]]:
    """By name, what makes the calls of each copy: ours and its peers."""

    def through(ops: Any) -> Calls:
        scratches = [workspace(ops, bench.args, batch, bench.device) for _ in inputs]
        suited = [op.suited(ops, one, scratch) for one, scratch in zip(inputs, scratches, strict=True)]
        return [partial(op.kind.call, ops, one) for one in suited]

    def through_compiled() -> Calls:
        ops = compiled(reference)  # weights as they are: the compiler knows no other layout
        plain = [replace(one, batch=replace(one.batch, workspace=Workspace())) for one in inputs]
        for one in plain:
            _ = one.batch.is_decode_step  # looked at now: the compiler cannot see through what a cached property locks
        return [partial(op.kind.call, ops, one) for one in plain]

    ways: dict[str, Callable[[], Calls]] = {OURS: partial(through, bench.ops)}
    if bench.ops is not reference:
        ways[REFERENCE] = partial(through, reference)
    ways[COMPILED] = through_compiled
    ways[LIBRARY] = lambda: [partial(op.kind.library, one) for one in inputs]
    return ways


def checked(op: Op, inputs: Sequence[Inputs], make: Callable[[], Calls]) -> Calls:
    """The calls, if they give what the reference gives. Difference if not. Also the warm-up, which compiles."""
    op.forget(inputs[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers, about speed and about themselves
        calls = make()
        output = calls[0]()
    if op.samples:
        for one, call in zip(inputs, calls, strict=True):
            check_draw(one, *call())
        return calls
    found = [tensor.clone() for tensor in op.results(inputs[0], output)]  # the cache is written again below
    expected = op.results(inputs[0], op.kind.call(reference, inputs[0]))
    for mine, theirs in zip(found, expected, strict=True):
        if mine.shape != theirs.shape:
            raise Difference(f"shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}")
        _compare(op.kind.tolerance, mine, theirs)
    return calls


def _compare(tolerance: str, ours: Tensor, expected: Tensor) -> None:
    try:
        assert_matches(tolerance, ours, expected)
    except AssertionError as error:
        raise Difference(one_line(error)) from None


def check_draw(inputs: Inputs, tokens: Tensor, logprobs: Tensor) -> None:
    """Difference for a token that top-p, or the argmax, cannot choose, or whose log-probability is another."""
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
        raise Difference(f"row {row}: token {int(tokens[row])} is none that can be chosen")
    _compare("sample", logprobs, torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, None])[:, 0])


def _timed(
    op: Op, bench: Bench, alive: dict[str, Calls], peers: dict[str, dict[str, Any]], progress: Progress
) -> dict[str, Any]:
    """Rounds of all ways in turn, every other one backwards."""
    contention = Contention()
    runs: dict[str, Callable[[], object]] = {}
    for name, calls in alive.items():
        try:
            runs[name] = replayed(partial(each, calls), bench.device)
        except Exception as error:  # what others do need not be fit for a graph
            if name == OURS:
                raise
            peers[name] = {"status": "failed", "reason": f"{op.name} in a CUDA graph: {one_line(error)}"}
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}  # µs of one call, by round
    before = bench.probe.sample().p50, bench.matmul.sample().p50
    for index in range(bench.rounds):
        progress(f"round {index + 1}/{bench.rounds}")
        for name in list(runs) if index % 2 == 0 else reversed(runs):
            times = time_calls(runs[name], device=bench.device, warmup=1, repeats=REPEATS, before=bench.flush)
            samples[name].append([MICRO * second / len(alive[name]) for second in times])
    # The higher neighbours, so that no share is flattered.
    read, matmul = map(max, before, (bench.probe.sample().p50, bench.matmul.sample().p50))
    machine = Machine(read=read * GIGA, matmul=matmul * TERA)
    least = MICRO * op.work.least_seconds(machine)

    def figures(name: str) -> dict[str, Any]:
        flat = [one for of_round in samples[name] for one in of_round]
        return {"microseconds": asdict(summarize(flat)), "share": least / percentile(flat, 50)}

    for name in peers.keys() & runs.keys():
        medians = [[percentile(one, 50) for one in samples[whose]] for whose in (name, OURS)]
        ratio = summarize(theirs / mine for theirs, mine in zip(*medians, strict=True))
        peers[name] |= figures(name) | {"ratio": asdict(ratio)}
    work = {"bytes": op.work.bytes, "flops": op.work.flops, "least_microseconds": least}
    return work | figures(OURS) | {"other_cores": contention.cores(), "peers": peers}


def each(calls: Calls) -> None:
    """All copies' turns."""
    for call in calls:
        call()
