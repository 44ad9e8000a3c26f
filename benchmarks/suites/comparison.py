"""A case on ours and on peers: outputs compared first, then rounds in which they take turns.

Each run stands between two samples of the read bandwidth, because a machine's speed drifts and only neighbours in time
can be compared. A ratio is the median of the rounds' own ratios. Stop tokens are put aside, so that every row has the
length that the case names.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from fastllama.benchmarks.ceilings import ReadProbe
from fastllama.benchmarks.peers.agreement import Agreement, compare
from fastllama.benchmarks.peers.client import PeerError
from fastllama.benchmarks.runner import OURS, Run, Runner
from fastllama.benchmarks.statistics import Summary, summarize
from fastllama.benchmarks.timing import Contention

Suite = Literal["kernels", "decode", "prefill", "generate", "load", "memory"]
SUITES: tuple[Suite, ...] = get_args(Suite)
DEFAULT_STEPS = 32
DEFAULT_ROUNDS = 3
MIN_STEPS = {"decode": 2}  # one inter-token latency needs two tokens; elsewhere one token is enough
PROMPT_SEED = 7
SHORTEST_PROMPT = 0.25  # of the longest, in a ragged batch

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """`batch` rows of `context` prompt tokens each, or up to that many in `generate`, decoded for `steps` tokens."""

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
        """Of the prompts. RaggedBatch ones are spread evenly, the longest first."""
        if self.suite != "generate" or self.batch == 1:
            return [self.context] * self.batch
        least = SHORTEST_PROMPT * self.context
        step = (self.context - least) / (self.batch - 1)
        return [max(1, round(self.context - row * step)) for row in range(self.batch)]

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same for every caller of the same case; rows differ."""
        generator = torch.Generator().manual_seed(PROMPT_SEED)
        ids = torch.randint(vocab_size, (self.batch, self.context), generator=generator).tolist()
        return [row[:length] for row, length in zip(ids, self.lengths, strict=True)]


@dataclass(frozen=True)
class Measured:
    """What the rounds of a case came to, by runner: ours is called OURS."""

    runs: dict[str, list[Run]]
    ceilings: dict[str, list[float]]  # read bandwidth around each run, GB/s
    reports: dict[str, dict[str, Any]]  # of each peer: its status and the reason for it
    warmup_seconds: float  # of our first run, which is not among `runs`
    other_cores: float  # that other programs kept busy meanwhile
    devices: int = 1  # that ours ran on, each with the ceilings of one

    def record(self, figures: "Figures", span: "Span") -> dict[str, Any]:
        """Ours by `figures`, and beside it every peer that was measured, with the ratio of their spans, round by round.

        A ratio above 1 says that ours is as many times as fast.
        """
        reports = {name: dict(report) for name, report in self.reports.items()}
        ours = self.runs[OURS]
        for name, report in reports.items():
            if report["status"] == "measured":
                pairs = zip(ours, self.runs[name], strict=True)
                ratio: Summary = summarize(span(theirs) / span(mine) for mine, theirs in pairs)
                report |= figures(self.runs[name], self.ceilings[name], 1) | {"ratio": asdict(ratio)}
        own = {"warmup_seconds": self.warmup_seconds, **figures(ours, self.ceilings[OURS], self.devices)}
        return {"other_cores": self.other_cores, **own, "peers": reports}


Figures = Callable[[list[Run], list[float], int], dict[str, Any]]  # of runs, the ceilings around them, and devices
Span = Callable[[Run], float]  # the seconds of a run that a case is about


def measure(
    case: Case,
    vocab_size: int,
    ours: Runner,
    peers: dict[str, Runner | PeerError | str],
    probe: ReadProbe,
    dtype: torch.dtype,
    progress: Progress,
    devices: int = 1,
) -> Measured:
    """Compare, then time. `peers` holds a Runner, the error that there was in starting it, or why there is none.

    devices: that ours runs on; a peer runs on one. KeyboardInterrupt passes through; the caller keeps earlier cases.
    """
    prompts = case.prompts(vocab_size)
    progress("comparing outputs")
    begin = time.perf_counter()
    own = ours.run(prompts, case.steps, logprobs=True)  # also the warm-up
    warmup_seconds = time.perf_counter() - begin
    reports: dict[str, dict[str, Any]] = {}
    timed: dict[str, Runner] = {OURS: ours}
    for name, peer in peers.items():
        if isinstance(peer, str):
            reports[name] = {"status": "skipped", "reason": peer}
            continue
        if isinstance(peer, PeerError):
            reports[name] = {"status": "failed", "reason": str(peer)}
            continue
        begin = time.perf_counter()
        try:
            agreement = compare(own, peer.run(prompts, case.steps, logprobs=True), dtype)
        except PeerError as error:
            reports[name] = {"status": "failed", "reason": str(error)}
            continue
        reports[name] = _report(agreement) | {"warmup_seconds": time.perf_counter() - begin}
        if agreement.agrees:
            timed[name] = peer
    contention = Contention()
    runs, ceilings = _time_rounds(case, timed, prompts, probe, reports, progress)
    return Measured(runs, ceilings, reports, warmup_seconds, contention.cores(), devices)


def _report(agreement: Agreement) -> dict[str, Any]:
    if agreement.agrees:
        return {"status": "measured", "agreement": asdict(agreement)}
    return {"status": "disagrees", "reason": agreement.difference, "agreement": asdict(agreement)}


def _time_rounds(
    case: Case,
    timed: dict[str, Runner],
    prompts: list[list[int]],
    probe: ReadProbe,
    reports: dict[str, dict[str, Any]],
    progress: Progress,
) -> tuple[dict[str, list[Run]], dict[str, list[float]]]:
    """(runs, read bandwidth in GB/s around each run) by runner; a peer that fails is reported and left out after."""
    runs: dict[str, list[Run]] = {name: [] for name in timed}
    ceilings: dict[str, list[float]] = {name: [] for name in timed}
    alive = dict(timed)
    for index in range(case.rounds):
        # Every other round runs backwards, so that nobody always goes first.
        order = list(alive) if index % 2 == 0 else list(reversed(alive))
        before = probe.sample().p50
        for name in order:
            progress(f"round {index + 1}/{case.rounds}, {name}")
            try:
                run = alive[name].run(prompts, case.steps)
            except PeerError as error:
                reports[name] |= {"status": "failed", "reason": str(error)}
                del alive[name]
                continue
            after = probe.sample().p50
            runs[name].append(run)
            # The higher neighbour: where the machine's bandwidth changed in between, the share is not flattered.
            ceilings[name].append(max(before, after))
            before = after
    return runs, ceilings
