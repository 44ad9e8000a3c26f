"""How fast tokens come: the decode suite. Equally long prompts, greedy steps; times are of the steps alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.measure import GIGA, MILLI, Summary, percentile, summarize
from fastllama.benchmarks.models import Run
from fastllama.benchmarks.rounds import Case, Measured, notes, peer_names, versus
from fastllama.benchmarks.tables import aligned
from fastllama.speed_of_light import decode_step, total_bytes


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
    itl_ms: list[float]  # every one

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
            itl_ms=flat,
        )


def record(case: Case, measured: Measured, args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """What the rounds of a case came to, ready for JSON."""
    # The cache that a step reads grows by one position a step.
    step_bytes = total_bytes(decode_step(args, dtype, case.batch, case.context + case.steps / 2))

    def figures(runs: list[Run], ceilings: list[float]) -> dict[str, Any]:
        return asdict(Timing.of(runs, ceilings, case.batch, step_bytes))

    return {"bytes_per_step": step_bytes, **measured.record(figures, lambda run: run.seconds[-1] - run.seconds[0])}


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records for people: one aligned line a case, and below them what has to be said of them."""
    peers = peer_names(records)
    head = ["batch", "context", "tokens/s", "itl ms p50", "p90", "p99", "ttft ms", "GB/s", "% of read"]
    rows: list[list[object]] = [[*head, *(f"vs {name}" for name in peers)]]
    for record in records:
        rows.append(
            [
                record["batch"],
                record["context"],
                f"{record['tokens_per_second']['p50']:.1f}",
                f"{record['median_itl_ms']:.2f}",
                f"{record['p90_itl_ms']:.2f}",
                f"{record['p99_itl_ms']:.2f}",
                f"{record['median_ttft_ms']:.1f}",
                f"{record['gb_per_second']:.1f}",
                f"{record['read_share'] * 100:.0f}%",
                *(versus(record, name) for name in peers),
            ]
        )
    return "\n".join([aligned(rows), *notes(records)])
