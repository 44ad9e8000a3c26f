"""The decode suite: the speed of greedy decode steps after equally long prompts. Times exclude the prompts."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.runners import Run
from fastllama.benchmarks.statistics import GIGA, latency, percentile, summarize, throughput
from fastllama.benchmarks.suites.interleaved import Case, CaseRuns
from fastllama.benchmarks.tables import Columns
from fastllama.quantization import NOTHING_QUANTIZED, Scheme
from fastllama.speed_of_light import decode_step, total_bytes

COLUMNS: Columns = {
    "batch": itemgetter("batch"),
    "context": itemgetter("context"),
    "tokens/s": lambda record: f"{record['tokens_per_second']['p50']:.1f}",
    "itl ms p50": lambda record: f"{record['median_itl_ms']:.2f}",
    "p90": lambda record: f"{record['p90_itl_ms']:.2f}",
    "p99": lambda record: f"{record['p99_itl_ms']:.2f}",
    "ttft ms": lambda record: f"{record['median_ttft_ms']:.1f}",
    "GB/s": lambda record: f"{record['gb_per_second']:.1f}",
    "% of read": lambda record: f"{record['read_share'] * 100:.0f}%",
}


def record(
    case: Case,
    case_runs: CaseRuns,
    args: ModelArgs,
    dtype: torch.dtype,
    schemes: Mapping[str, Scheme] = NOTHING_QUANTIZED,
) -> dict[str, Any]:
    """The figures of a case as JSON. Rates count the decode steps of all rows."""
    # Each step reads one position more than the last, so the mean is used.
    step_bytes = total_bytes(decode_step(args, dtype, case.batch, case.context + case.steps / 2, schemes))
    n_steps = case.steps - 1  # the first token comes with the prompts

    def figures(runs: list[Run], ceilings: list[float], devices: int) -> dict[str, Any]:
        spans = [_span(run) for run in runs]
        itls = [[later - sooner for sooner, later in pairwise(run.seconds)] for run in runs]
        bandwidths = [step_bytes * n_steps / span / GIGA for span in spans]
        shares = [bandwidth / (devices * ceiling) for bandwidth, ceiling in zip(bandwidths, ceilings, strict=True)]
        return {
            **throughput(case.batch * n_steps, spans),
            **latency("ttft", [run.seconds[0] for run in runs]),
            **latency("itl", [second for row in itls for second in row]),
            "itls": itls,  # seconds, of each run
            "gb_per_second": percentile(bandwidths, 50),
            "read_share": percentile(shares, 50),
            "read_gb_per_second": asdict(summarize(ceilings)),
        }

    sizes = {"n_prompt": 0, "n_gen": n_steps, "n_depth": case.context, "bytes_per_step": step_bytes}
    return sizes | case_runs.record(figures, _span)


def _span(run: Run) -> float:
    return run.seconds[-1] - run.seconds[0]
