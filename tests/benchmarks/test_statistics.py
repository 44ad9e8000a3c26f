"""Percentiles and summaries."""

import pytest

from fastllama.benchmarks.statistics import percentile, summarize


@pytest.mark.parametrize(("percent", "expected"), [(0, 10.0), (25, 12.5), (50, 15.0), (90, 19.0), (100, 20.0)])
def test_percentile_interpolates(percent: float, expected: float) -> None:
    assert percentile([20.0, 10.0], percent) == pytest.approx(expected)


def test_percentile_of_one_sample_is_that_sample() -> None:
    assert [percentile([3.0], percent) for percent in (0, 50, 99)] == [3.0, 3.0, 3.0]


def test_percentile_rejects_no_samples_and_percents_above_100() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], 101)


def test_summarize_has_percentiles() -> None:
    summary = summarize(float(value) for value in range(100, -1, -1))
    assert (summary.count, summary.minimum, summary.maximum) == (101, 0.0, 100.0)
    assert (summary.p10, summary.p50, summary.p90, summary.p99) == (10.0, 50.0, 90.0, 99.0)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_summarize_rejects_no_samples_and_non_finite_samples(samples: list[float]) -> None:
    with pytest.raises(ValueError):
        summarize(samples)
