"""Throughput and latency under the names of llama-bench and vLLM, so that tools for their results can read ours.

Rates have llama-bench's names: `avg_ts`, `stddev_ts` and `samples_ts` in tokens a second, `samples_ns` and so on in
nanoseconds. Latencies have vLLM's: `median_ttft_ms`, `p99_itl_ms` and so on. `tokens_per_second` has percentiles.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastllama.benchmarks.statistics import MILLI, NANO, percentile, summarize


def throughput(tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    """The rates of generating `tokens` tokens, once in each of `seconds`."""
    rates = [tokens / second for second in seconds]
    nanoseconds = [round(second * NANO) for second in seconds]
    return {
        "tokens_per_second": asdict(summarize(rates)),
        "samples_ts": rates,
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": _deviation(rates),
        "samples_ns": nanoseconds,
        "avg_ns": round(statistics.fmean(nanoseconds)),
        "stddev_ns": round(_deviation(nanoseconds)),
    }


def latency(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation, p90 and p99 in ms. name: vLLM's name of the latency: ttft, itl or e2el."""
    samples = [MILLI * second for second in seconds]
    return {
        f"mean_{name}_ms": statistics.fmean(samples),
        f"median_{name}_ms": percentile(samples, 50),
        f"std_{name}_ms": statistics.pstdev(samples),
        f"p90_{name}_ms": percentile(samples, 90),
        f"p99_{name}_ms": percentile(samples, 99),
    }


def _deviation(samples: Sequence[float]) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0
