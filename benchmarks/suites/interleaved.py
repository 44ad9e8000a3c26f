"""Runs one case on ours and on the peers: compares their outputs, then times them in rounds.

The speed of a machine drifts, so a round has one run of each, and a ratio is the median of the rounds' ratios. Read
bandwidth is sampled before and after each run. Stop tokens are switched off: every row has the case's length.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch

from fastllama.benchmarks.ceilings import AdjacentSamples, ReadProbe
from fastllama.benchmarks.child_process import ChildError
from fastllama.benchmarks.peers.agreement import compare
from fastllama.benchmarks.runners import OURS, Runner, Server
from fastllama.benchmarks.statistics import summarize
from fastllama.benchmarks.timing import Contention

Suite = Literal["kernels", "decode", "prefill", "generate", "requests", "speculate", "load", "memory"]
SUITES: tuple[Suite, ...] = get_args(Suite)
DEFAULT_STEPS = 32
DEFAULT_ROUNDS = 3
MIN_STEPS = {"decode": 2}  # an inter-token latency needs two tokens
PROMPT_SEED = 7
SHORTEST_PROMPT = 0.25  # of the longest, in `generate`

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """`batch` rows with prompts of `context` tokens (in `generate` at most that many) and `steps` new tokens each."""

    suite: Suite
    batch: int
    context: int
    steps: int = DEFAULT_STEPS
    rounds: int = DEFAULT_ROUNDS

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("context", 1), ("steps", MIN_STEPS.get(self.suite, 1)), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def label(self) -> str:
        return f"batch {self.batch} context {self.context}"

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each prompt. In `generate` they decrease evenly from `context` to a quarter of it."""
        if self.suite != "generate" or self.batch == 1:
            return [self.context] * self.batch
        least = SHORTEST_PROMPT * self.context
        step = (self.context - least) / (self.batch - 1)
        return [max(1, round(self.context - row * step)) for row in range(self.batch)]

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids: different in each row, and the same on every call."""
        generator = torch.Generator().manual_seed(PROMPT_SEED)
        ids = torch.randint(vocab_size, (self.batch, self.context), generator=generator).tolist()
        return [row[:length] for row, length in zip(ids, self.lengths, strict=True)]

    def run(self, runner: Any, vocab_size: int, index: int, logprobs: bool = False) -> Any:
        """Run the case on a runner -> its Run. index: 0 to compare outputs, then the round."""
        return runner.run(self.prompts(vocab_size), self.steps, logprobs)


# Runs are of the type that the case's `run` returns: Run, and ServedRun in `requests`.
Figures = Callable[[list[Any], list[float], int], dict[str, Any]]  # (runs, ceiling beside each, devices) -> figures
Span = Callable[[Any], float]  # the seconds of a run that a suite compares


@dataclass(frozen=True)
class CaseRuns:
    """The runs of a case by runner, and how they were made. Ours is called OURS."""

    runs: dict[str, list[Any]]
    ceilings: dict[str, list[float]]  # read bandwidth beside each run, GB/s
    reports: dict[str, dict[str, Any]]  # of each peer: its status and the reason for it
    warmup_seconds: float  # of our first run, which is not among `runs`
    other_cores: float  # cores that other programs used during the rounds
    devices: int = 1  # devices that ours runs on; the ceilings are those of one device

    def record(self, figures: Figures, span: Span) -> dict[str, Any]:
        """Our figures, and under "peers" each peer's figures and ratio. Above 1, ours is faster."""
        spans = {name: [span(run) for run in runs] for name, runs in self.runs.items()}
        peers = measured_peers(self.reports, lambda name: figures(self.runs[name], self.ceilings[name], 1), spans)
        own = {"warmup_seconds": self.warmup_seconds, **figures(self.runs[OURS], self.ceilings[OURS], self.devices)}
        return {"other_cores": self.other_cores, **own, "peers": peers}


def measured_peers(
    reports: dict[str, dict[str, Any]], figures: Callable[[str], dict[str, Any]], spans: dict[str, list[float]]
) -> dict[str, dict[str, Any]]:
    """The reports of peers, with the figures and the ratio of those that were measured.

    spans: each runner's seconds, round by round. The ratio is the peer's over ours.
    """
    found = {}
    for name, report in reports.items():
        found[name] = dict(report)
        if report["status"] == "measured":
            ratio = summarize(peer / ours for peer, ours in zip(spans[name], spans[OURS], strict=True))
            found[name] |= figures(name) | {"ratio": asdict(ratio)}
    return found


def run_case(
    case: Case,
    vocab_size: int,
    ours: Runner | Server,
    peers: Mapping[str, Runner | Server | ChildError | str],
    probe: ReadProbe,
    dtype: torch.dtype | None,
    progress: Progress,
    devices: int = 1,
) -> CaseRuns:
    """Compare outputs, then time the runners that agree.

    dtype: decides how near outputs must be. None: they are not compared, as the runners round weights differently.
    ours, peers: what the case's `run` takes. In place of a peer: the error of one that did not start, or the reason why
    one does not run.
    devices: the number of devices that ours runs on; a peer runs on one.
    """
    progress("comparing outputs")
    run = partial(case.run, vocab_size=vocab_size)
    begin = time.perf_counter()
    own = run(ours, index=0, logprobs=True)  # also the warm-up
    warmup_seconds = time.perf_counter() - begin
    reports = {name: _compared(own, peer, run, dtype) for name, peer in peers.items()}
    agreeing = {name: peer for name, peer in peers.items() if reports[name]["status"] == "measured"}
    contention = Contention()
    timed = {OURS: ours, **agreeing}
    runs, ceilings = _time_rounds(case.rounds, timed, run, probe, reports, progress)
    return CaseRuns(runs, ceilings, reports, warmup_seconds, contention.cores(), devices)


def _compared(
    own: Any, peer: Runner | Server | ChildError | str, run: Callable[..., Any], dtype: torch.dtype | None
) -> dict[str, Any]:
    """The report of one peer: its status, the reason for it, and how its outputs compare with our run."""
    if isinstance(peer, str):
        return {"status": "skipped", "reason": peer}
    begin = time.perf_counter()
    try:
        if isinstance(peer, ChildError):
            raise peer
        theirs = run(peer, index=0, logprobs=True)
    except ChildError as error:
        return {"status": "failed", "reason": str(error)}
    seconds = time.perf_counter() - begin
    if dtype is None:
        return {"status": "measured", "agreement": None, "warmup_seconds": seconds}
    agreement = compare(own, theirs, dtype)
    status = {"status": "measured"} if agreement.agrees else {"status": "disagrees", "reason": agreement.difference}
    return {**status, "agreement": asdict(agreement), "warmup_seconds": seconds}


def _time_rounds(
    rounds: int,
    timed: Mapping[str, Any],
    run: Callable[..., Any],
    probe: ReadProbe,
    reports: dict[str, dict[str, Any]],
    progress: Progress,
) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
    """(runs, read bandwidth in GB/s beside each run) by runner. A peer that fails is reported and left out."""
    runs: dict[str, list[Any]] = {name: [] for name in timed}
    ceilings: dict[str, list[float]] = {name: [] for name in timed}
    working = dict(timed)
    for index, names in rounds_in_turn(working, rounds):
        samples = AdjacentSamples(probe)
        for name in names:
            progress(f"round {index}/{rounds}, {name}")
            try:
                found = run(working[name], index=index)
            except ChildError as error:
                reports[name] |= {"status": "failed", "reason": str(error)}
                del working[name]
                continue
            runs[name].append(found)
            ceilings[name].append(samples.higher())
    return runs, ceilings


def rounds_in_turn(names: Iterable[str], rounds: int) -> Iterator[tuple[int, list[str]]]:
    """(round from 1, names in its order). Every second round is reversed, so that no name is always first."""
    for index in range(rounds):
        yield index + 1, list(names)[:: -1 if index % 2 else 1]
