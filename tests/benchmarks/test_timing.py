"""Timing calls, and the CPU time of other processes. No test asserts a speed."""

import pytest

from fastllama.benchmarks.timing import Contention, time_calls
from tests.benchmarks.cases import CPU


def test_time_calls_does_not_time_the_warm_up() -> None:
    calls: list[int] = []
    times = time_calls(lambda: calls.append(1), device=CPU, warmup=3, repeats=5)
    assert (len(times), len(calls)) == (5, 8)
    assert all(second >= 0 for second in times)


def test_time_calls_repeats_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that advances by a second each time it is read: one second in a call, two more around it.
    ticks = iter(range(1000))
    monkeypatch.setattr("fastllama.benchmarks.timing.time.perf_counter", lambda: float(next(ticks)))
    times = time_calls(lambda: None, device=CPU, warmup=0, repeats=2, seconds=30.0)
    assert set(times) == {1.0}
    assert len(times) == 11


def test_contention_is_the_cpu_time_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([(0.0, 100.0, 10.0), (10.0, 125.0, 20.0), (10.0, 105.0, 20.0)])
    monkeypatch.setattr(Contention, "_now", staticmethod(lambda: next(moments)))
    contention = Contention()
    assert contention.cores() == pytest.approx(1.5)
    assert contention.cores() == 0.0  # never negative, although the clocks have different resolutions
