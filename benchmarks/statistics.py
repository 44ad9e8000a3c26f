"""Percentiles of samples, and factors between units."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

MILLI = 1e3  # in a second
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

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        return (self.p90 - self.p10) / self.p50 if self.p50 else 0.0


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
