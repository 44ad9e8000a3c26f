"""`bench compare`: ratios with their ranges, regressions, and files of different machines."""

import dataclasses
import json
from typing import Any

import pytest

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.compare_results import compare_results, report
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.result_file import ResultFile
from fastllama.benchmarks.statistics import summarize


def decode(*rates: float, batch: int = 1, **more: Any) -> dict[str, Any]:
    summary = dataclasses.asdict(summarize(rates))
    return {"suite": "decode", "model": "tiny", "batch": batch, "context": 8, "tokens_per_second": summary, **more}


def result(*records: dict[str, Any], read: float = 10.0, **environment: Any) -> ResultFile:
    where = dataclasses.replace(describe_environment("cpu"), **environment)
    return ResultFile(where, {"read": Ceiling("read", "GB/s", "by hand", summarize([read]))}, list(records))


def test_a_ratio_has_a_range_from_both_spreads() -> None:
    found = compare_results(result(decode(90, 100, 110)), result(decode(180, 200, 220), read=15.0))
    (change,) = found.changes
    assert (change.first, change.second, change.ratio) == (100, 200, 2.0)
    assert change.low == pytest.approx(184 / 108) and change.high == pytest.approx(216 / 92)
    assert change.verdict == "better" and found.read_ratio == 1.5 and not found.regressions


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ((80, 80, 80), "REGRESSION"),
        ((97, 97, 97), ""),
        ((50, 96, 110), ""),
        ((104, 104, 104), ""),
        ((120, 120), "better"),
        ((80,), "no spread"),
    ],
)
def test_a_change_is_marked_where_its_whole_range_is_beyond_the_threshold(
    second: tuple[float, ...], verdict: str
) -> None:
    found = compare_results(result(decode(100, 100, 100)), result(decode(*second)))
    assert [change.verdict for change in found.changes] == [verdict]
    assert len(found.regressions) == (verdict == "REGRESSION")


def test_the_ratio_is_inverted_if_less_is_better() -> None:
    times = [{"suite": "kernels", "op": "qkv", "microseconds": dataclasses.asdict(summarize([t, t]))} for t in (10, 20)]
    memory = [{"suite": "memory", "peak_bytes": size, "held_bytes": 5} for size in (100, 50)]
    found = compare_results(result(times[0], memory[0]), result(times[1], memory[1]))
    assert [(change.figure, change.ratio, change.verdict) for change in found.changes] == [
        ("microseconds", 0.5, "REGRESSION"),
        ("peak_bytes", 2.0, "better"),
        ("held_bytes", 1.0, ""),
    ]


def test_records_of_gpu_reports_are_compared_too() -> None:
    records = [
        {"suite": "decode", "model": "3-8B", "batch": 1, "context": 64, "tokens_per_second": rate}
        | {"slowest": rate - 1, "fastest": rate + 1}
        for rate in (100.0, 80.0)
    ]
    (change,) = compare_results(result(records[0]), result(records[1])).changes
    assert change.verdict == "REGRESSION" and change.low == pytest.approx(79 / 101)


def test_cases_in_only_one_file_are_named() -> None:
    first, second = (
        result(decode(1), decode(2, batch=2)),
        result(decode(1), decode(3, batch=3), {"suite": "load", "not_run": ""}),
    )
    found = compare_results(first, second)
    assert found.only_first == ["decode tiny batch 2 context 8"]
    assert found.only_second == ["decode tiny batch 3 context 8"]
    json.dumps(found.to_json(), allow_nan=False)
    for in_markdown in (False, True):
        shown = report(found, first, second, in_markdown)
        assert "only in the first: decode tiny batch 2" in shown and "1.00x" in shown and "0 regressions" in shown
        assert ("| --- |" in shown) is in_markdown


def test_other_machines_are_refused_without_anyway() -> None:
    first, second = result(decode(1), device_name="one"), result(decode(1), device_name="two")
    with pytest.raises(ValueError, match=r"different machines: device_name one and two; use --anyway"):
        compare_results(first, second)
    assert compare_results(first, second, anyway=True).changes
    with pytest.raises(ValueError, match="threads 1 and 7"):
        compare_results(result(decode(1), threads=1), result(decode(1), threads=7))


def test_files_with_nothing_in_common_are_an_error() -> None:
    with pytest.raises(ValueError, match="no figure in common"):
        compare_results(result(decode(1)), result(decode(1, batch=2)))


def test_a_case_that_became_wrong_is_broken_and_not_only_missing() -> None:
    op = {"suite": "kernels", "op": "qkv", "batch": 1}
    first = result(decode(1, 1), op | {"microseconds": dataclasses.asdict(summarize([10, 10]))})
    second = result(decode(1, 1), op | {"not_run": "fastllama disagrees: qkv: not close", "status": "disagrees"})
    found = compare_results(first, second)
    assert found.fails and not found.regressions and found.only_first == []
    assert found.broken == ["kernels qkv batch 1: fastllama disagrees: qkv: not close"]
    assert "BROKEN in the second: kernels qkv" in report(found, first, second)
    assert not compare_results(first, first).fails


def test_the_time_of_tests_is_not_compared() -> None:
    tests = [{"suite": "tests", "seconds": seconds, "n_failed": 0} for seconds in (30.0, 60.0)]
    found = compare_results(result(decode(1, 1), tests[0]), result(decode(1, 1), tests[1]))
    assert [change.figure for change in found.changes] == ["tokens_per_second"]


def test_a_change_of_the_machine_is_noted() -> None:
    first, second = result(decode(1, 1)), result(decode(1, 1), read=5.0)
    assert "bandwidth changed" in report(compare_results(first, second), first, second)
    assert "bandwidth changed" not in report(compare_results(first, first), first, first)
