"""The plots of a result: their files and sizes, and the figures in them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from fastllama.benchmarks import plots
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.result_file import ResultFile
from fastllama.benchmarks.runners import Run, ServedRun
from fastllama.benchmarks.statistics import summarize
from fastllama.benchmarks.suites import decode, requests
from fastllama.benchmarks.suites.interleaved import Case, CaseRuns
from fastllama.benchmarks.suites.requests import RequestsCase
from fastllama.benchmarks.suites.step_launches import LaunchTime
from fastllama.speed_of_light import Machine, Work
from tests.benchmarks.cases import ARGS

MACHINE = Machine(read=1e9, matmul=1e12)


def record(batch: int, context: int) -> dict[str, Any]:
    case = Case("decode", batch, context, steps=3, rounds=2)
    ours, peer = ([Run([[0] * 3] * batch, [0.1, 0.1 + one, 0.1 + 2 * one])] * 2 for one in (0.01, 0.02))
    measured = CaseRuns(
        {"fastllama": ours, "reference": peer},
        {"fastllama": [1.0, 2.0], "reference": [1.0, 2.0]},
        {"reference": {"status": "measured"}, "transformers": {"status": "skipped", "reason": "absent"}},
        0.0,
        0.0,
    )
    launches = [
        LaunchTime(Work("qkv", 2, bytes=2e5, flops=1e3), summarize([400.0])).against(MACHINE),
        LaunchTime(Work("sampling", 2, bytes=0, flops=0), summarize([50.0])).against(MACHINE),
    ]
    found = decode.record(case, measured, ARGS, torch.float32)
    return dataclasses.asdict(case) | found | {"model": "tiny", "dtype": "float32", "launches": launches}


def result(*records: dict[str, Any]) -> ResultFile:
    return ResultFile(describe_environment("cpu"), {}, list(records))


def test_draws_three_plots_with_a_panel_for_each_context(tmp_path: Path) -> None:
    found = plots.draw(result(*(record(batch, context) for context in (8, 16) for batch in (1, 4))), tmp_path / "run")
    assert [path.name for path in found] == ["throughput.png", "launches.png", "latency.png"]
    assert {path.stem for path in found} == set(plots.DECODE_NAMES)
    for path in found:
        with Image.open(path) as image:
            size = image.size
            colors = len(image.convert("RGB").getcolors(2**20) or [])
        expected = (2 * plots.PANEL_INCHES[0] * plots.DOTS_PER_INCH, plots.PANEL_INCHES[1] * plots.DOTS_PER_INCH)
        assert size == pytest.approx(expected, abs=1) and colors > 20


def test_throughput_shows_ours_the_peers_and_the_limit() -> None:
    axis = Figure().subplots()
    records = [record(1, 8), record(4, 8)]
    plots._throughput(axis, records)
    assert set(axis.get_legend_handles_labels()[1]) == {"limit: read bandwidth", "fastllama", "reference"}
    limits = [one["batch"] * 1.5e9 / one["bytes_per_step"] for one in records]
    assert _heights(axis.get_lines()[0]) == pytest.approx(limits)
    rates = {
        bars.get_label(): _heights(bars.lines[0]) for bars in axis.containers if isinstance(bars, ErrorbarContainer)
    }
    assert rates == {"fastllama": pytest.approx([100, 400]), "reference": pytest.approx([50, 200])}


def _heights(line: Any) -> list[float]:
    return [float(height) for height in line.get_ydata()]


def test_launches_are_stacked_for_measured_and_least_times() -> None:
    axis = Figure().subplots()
    plots._launches(axis, [record(1, 8)])
    heights = [bar.get_height() for bar in axis.patches]  # type: ignore[attr-defined]
    assert heights == pytest.approx([0.8, 0.1, 0.4, 0.0])  # 2 x 400 and 2 x 50 µs; 2 x 200 µs and nothing


def requests_record(batch: int, times: list[float]) -> dict[str, Any]:
    case = RequestsCase("requests", batch, 16, steps=3, rounds=1, requests=2)
    ours, peer = ([ServedRun([[0] * 3] * 2, [0.0, 0.0], [[end], [end]])] for end in times)
    runs = {"fastllama": ours, "fixed-8": peer}
    measured = CaseRuns(runs, {"fastllama": [1.0], "fixed-8": [1.0]}, {"fixed-8": {"status": "measured"}}, 0.0, 0.0)
    return dataclasses.asdict(case) | requests.record(case, measured) | {"model": "tiny", "dtype": "float32"}


def test_requests_has_a_curve_of_ours_and_of_each_peer(tmp_path: Path) -> None:
    records = [requests_record(4, [0.5, 2.0]), requests_record(1, [1.0, 2.0])]
    assert plots.draw(result(*records), tmp_path / "run") == [tmp_path / "run" / "requests.png"]
    axis = Figure().subplots()
    plots._requests(axis, sorted(records, key=lambda one: int(one["batch"])))
    n_tokens = sum(records[0]["output_lens"])
    curves = [bars for bars in axis.containers if isinstance(bars, ErrorbarContainer)]
    assert {bars.get_label(): _heights(bars.lines[0]) for bars in curves} == {
        "fastllama": pytest.approx([n_tokens, n_tokens / 0.5]),
        "fixed-8": pytest.approx([n_tokens / 2.0] * 2),
    }


def test_speculate_shows_speed_up_by_right_guesses_with_copying_tasks_apart() -> None:
    axis = Figure().subplots()
    records = [
        {"copies": copies, "acceptance": share, "ratio": {"p50": ratio, "minimum": ratio - 0.1, "maximum": ratio + 0.2}}
        for copies, share, ratio in ((True, 0.9, 2.0), (True, 0.5, 1.5), (False, 0.1, 1.0))
    ]
    plots._speculate(axis, records)
    kinds = {bars.get_label(): bars.lines[0] for bars in axis.containers if isinstance(bars, ErrorbarContainer)}
    assert {label: _heights(line) for label, line in kinds.items()} == {"tasks that copy": [2.0, 1.5], "others": [1.0]}
    shares: Any = kinds["tasks that copy"].get_xdata()
    assert [float(share) for share in shares] == pytest.approx([90, 50])
    assert len({line.get_marker() for line in kinds.values()}) == 2


def test_a_result_without_decode_has_no_plots(tmp_path: Path) -> None:
    assert plots.draw(result({"suite": "memory"}), tmp_path / "run") == []
    assert not (tmp_path / "run").exists()
