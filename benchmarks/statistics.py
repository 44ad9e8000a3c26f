"""Percentiles of samples, and throughput and latency under the names of other benchmarks.

Rates have llama-bench's names: `avg_ts`, `stddev_ts` and `samples_ts` in tokens a second, `samples_ns` and so on in
nanoseconds. Latencies have vLLM's: `median_ttft_ms`, `p99_itl_ms` and so on.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev, stdev
from typing import Any

MILLI = 1e3  # milliseconds in a second
MICRO = 1e6
NANO = 1e9
GIGA = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Summary:
    """Percentiles of samples, in their unit."""

    count: int
    minimum: float
    p10: float
    p50: float
    p90: float
    p99: float
    maximum: float


def percentile(samples: Iterable[float], percent: float) -> float:
    """The `percent`-th percentile (0 to 100), interpolated linearly. ValueError without samples."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples: a percentile needs at least one")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must lie between 0 and 100, got {percent}")
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(samples: Iterable[float]) -> Summary:
    """The Summary of samples. ValueError if there are none or one is not finite."""
    values = list(samples)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"samples must be finite, got {values}")
    p10, p50, p90, p99 = (percentile(values, percent) for percent in (10, 50, 90, 99))
    return Summary(len(values), min(values), p10, p50, p90, p99, max(values))


def throughput(tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    """The rates of generating `tokens` tokens, once in each of `seconds`."""
    rates = [tokens / second for second in seconds]
    nanoseconds = [round(second * NANO) for second in seconds]
    return {
        "tokens_per_second": asdict(summarize(rates)),
        "samples_ts": rates,
        "avg_ts": fmean(rates),
        "stddev_ts": _deviation(rates),
        "samples_ns": nanoseconds,
        "avg_ns": round(fmean(nanoseconds)),
        "stddev_ns": round(_deviation(nanoseconds)),
    }


def latency(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation, p90 and p99 in ms. name: vLLM's name of it: ttft, tpot, itl, e2el."""
    samples = [MILLI * second for second in seconds]
    return {
        f"mean_{name}_ms": fmean(samples),
        f"median_{name}_ms": percentile(samples, 50),
        f"std_{name}_ms": pstdev(samples),
        f"p90_{name}_ms": percentile(samples, 90),
        f"p99_{name}_ms": percentile(samples, 99),
    }


def _deviation(samples: Sequence[float]) -> float:
    return stdev(samples) if len(samples) > 1 else 0.0
