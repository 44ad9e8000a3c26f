"""How fast tokens come: the decode suite.

Each case is a batch of equally long random prompts and a number of greedy steps. Outputs are compared with the peer's
first; then rounds alternate between ours and the peer's, each between two samples of the read bandwidth, because a
machine's speed drifts and only neighbours in time can be compared. A ratio is the median of the rounds' own ratios.

Stop tokens are put aside for the run, so that every row has the length that the case names.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.measure import GIGA, Contention, ReadProbe, Summary, percentile, summarize, synchronize
from fastllama.benchmarks.models import Run
from fastllama.benchmarks.peers import Agreement, PeerError, compare
from fastllama.benchmarks.tables import aligned
from fastllama.generation import Llama
from fastllama.speed_of_light import decode_step, total_bytes

DEFAULT_STEPS = 32
DEFAULT_ROUNDS = 3
MIN_STEPS = 2  # one inter-token latency needs two tokens
PROMPT_SEED = 7
MILLI = 1e3
BUSY_CORES = 0.1  # cores used by others from which a figure deserves a warning

Progress = Callable[[str], None]


class Runner(Protocol):
    """Ours or a peer: greedy tokens for equally long prompts, with the time of each step."""

    def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run: ...


@dataclass(frozen=True)
class DecodeCase:
    """`batch` rows of `context` prompt tokens each, decoded for `steps` tokens, `rounds` times."""

    batch: int
    context: int
    steps: int = DEFAULT_STEPS
    rounds: int = DEFAULT_ROUNDS

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("context", 1), ("steps", MIN_STEPS), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same for every caller of the same case; rows differ."""
        generator = torch.Generator().manual_seed(PROMPT_SEED)
        shape = (self.batch, self.context)
        ids: list[list[int]] = torch.randint(vocab_size, shape, generator=generator).tolist()
        return ids


class Ours:
    """fastllama as a Runner, through `Llama.stream`: what a user of the runtime gets, tokenizer and all."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run:
        device = self._llm.model.device
        tokens: list[list[int]] = [[] for _ in prompts]
        scores: list[list[float]] = [[] for _ in prompts]
        seconds: list[float] = []
        with _without_stop_tokens(self._llm):
            synchronize(device)
            start = time.perf_counter()
            for increment in self._llm.stream(prompts, steps, temperature=0.0, logprobs=logprobs):
                tokens[increment.row] += increment.tokens
                scores[increment.row] += increment.logprobs or []
                # A step is over when the slowest row has its token.
                complete = min(len(row) for row in tokens)
                if complete > len(seconds):
                    seconds += [time.perf_counter() - start] * (complete - len(seconds))
        return Run(tokens, seconds, scores if logprobs else None)


@contextlib.contextmanager
def _without_stop_tokens(llm: Llama) -> Iterator[None]:
    kept = llm.tokenizer.stop_tokens
    llm.tokenizer.stop_tokens = set()
    try:
        yield
    finally:
        llm.tokenizer.stop_tokens = kept


@dataclass(frozen=True)
class Timing:
    """What the rounds of one runner came to. Latencies in ms; tokens/s over all rows, of the decode steps only."""

    tokens_per_second: Summary
    median_ttft_ms: float
    median_itl_ms: float
    p90_itl_ms: float
    p99_itl_ms: float
    gb_per_second: float
    read_share: float
    read_gb_per_second: Summary

    @classmethod
    def of(cls, runs: Sequence[Run], ceilings: Sequence[float], batch: int, step_bytes: float) -> "Timing":
        """From runs and the read bandwidth (GB/s) that was sampled around each of them."""
        latencies = [[b - a for a, b in zip(run.seconds, run.seconds[1:], strict=False)] for run in runs]
        flat = [latency * MILLI for row in latencies for latency in row]
        rates = [batch * len(row) / sum(row) for row in latencies]
        bandwidths = [step_bytes * rate / batch / GIGA for rate in rates]
        shares = [bandwidth / ceiling for bandwidth, ceiling in zip(bandwidths, ceilings, strict=True)]
        return cls(
            tokens_per_second=summarize(rates),
            median_ttft_ms=percentile([run.seconds[0] * MILLI for run in runs], 50),
            median_itl_ms=percentile(flat, 50),
            p90_itl_ms=percentile(flat, 90),
            p99_itl_ms=percentile(flat, 99),
            gb_per_second=percentile(bandwidths, 50),
            read_share=percentile(shares, 50),
            read_gb_per_second=summarize(ceilings),
        )


def run_case(
    case: DecodeCase,
    ours: Runner,
    peers: dict[str, Runner | str],
    probe: ReadProbe,
    *,
    model: str,
    args: ModelArgs,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Any]:
    """Compare, then time one case -> its record, ready for JSON.

    `peers` holds a Runner or the reason why there is none. KeyboardInterrupt passes through; the caller keeps earlier
    cases.
    """
    prompts = case.prompts(args.vocab_size)
    label = f"decode {model} batch {case.batch} context {case.context}"
    progress(f"{label}: comparing outputs")
    own = ours.run(prompts, case.steps, logprobs=True)  # also the warm-up
    reports: dict[str, dict[str, Any]] = {}
    timed: dict[str, Runner] = {"fastllama": ours}
    for name, peer in peers.items():
        if isinstance(peer, str):
            reports[name] = {"status": "skipped", "reason": peer}
            continue
        try:
            agreement = compare(own, peer.run(prompts, case.steps, logprobs=True), dtype)
        except PeerError as error:
            reports[name] = {"status": "failed", "reason": str(error)}
            continue
        reports[name] = _report(agreement)
        if agreement.agrees:
            timed[name] = peer
    contention = Contention()
    runs, ceilings = _time_rounds(case, timed, prompts, probe, reports, lambda text: progress(f"{label}: {text}"))

    other_cores = contention.cores()
    # The cache that a step reads grows by one position a step.
    step_bytes = total_bytes(decode_step(args, dtype, case.batch, case.context + case.steps / 2))
    timings = {name: Timing.of(runs[name], ceilings[name], case.batch, step_bytes) for name in timed if runs[name]}
    for name, timing in timings.items():
        if name in reports and reports[name]["status"] == "measured":
            reports[name] |= asdict(timing) | {"ratio": asdict(_ratio(runs["fastllama"], runs[name]))}
    return {
        "suite": "decode",
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(case),
        "bytes_per_step": step_bytes,
        "other_cores": other_cores,
        **asdict(timings["fastllama"]),
        "peers": reports,
    }


def _report(agreement: Agreement) -> dict[str, Any]:
    if agreement.agrees:
        return {"status": "measured", "agreement": asdict(agreement)}
    return {"status": "disagrees", "reason": agreement.difference, "agreement": asdict(agreement)}


def _time_rounds(
    case: DecodeCase,
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


def _ratio(ours: Sequence[Run], theirs: Sequence[Run]) -> Summary:
    """Ours over the peer's decode speed, round by round: both ran next to each other there."""
    pairs = zip(ours, theirs, strict=True)
    return summarize((b.seconds[-1] - b.seconds[0]) / (a.seconds[-1] - a.seconds[0]) for a, b in pairs)


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records for people: one aligned line a case, and below them why a peer was not timed."""
    header = [
        "batch",
        "context",
        "tokens/s",
        "itl ms p50",
        "p90",
        "p99",
        "ttft ms",
        "GB/s",
        "% of read",
        "vs reference",
    ]
    rows = [header]
    notes: list[str] = []
    for record in records:
        peer = record["peers"].get("reference")
        rows.append(
            [
                str(record["batch"]),
                str(record["context"]),
                f"{record['tokens_per_second']['p50']:.1f}",
                f"{record['median_itl_ms']:.2f}",
                f"{record['p90_itl_ms']:.2f}",
                f"{record['p99_itl_ms']:.2f}",
                f"{record['median_ttft_ms']:.1f}",
                f"{record['gb_per_second']:.1f}",
                f"{record['read_share'] * 100:.0f}%",
                _versus(peer),
            ]
        )
        if peer is not None and peer["status"] != "measured":
            note = f"reference {peer['status']}: {peer['reason']}"
            notes += [note] if note not in notes else []
        if record["other_cores"] > BUSY_CORES:
            notes.append(
                f"batch {record['batch']} context {record['context']}: other programs used {record['other_cores']:.1f} "
                "cores meanwhile; measure again when they rest"
            )
    return "\n".join([aligned(rows), *notes])


def _versus(peer: dict[str, Any] | None) -> str:
    if peer is None:
        return "-"
    if peer["status"] != "measured":
        return str(peer["status"])
    ratio = peer["ratio"]
    return f"{ratio['p50']:.2f}x ({ratio['minimum']:.2f}-{ratio['maximum']:.2f})"
