"""Plots of a result: tokens per second by batch size, a step's launches, latencies; of the requests suite, tokens per
second by the number of requests at a time; of the speculate suite, speed-up by the share of right guesses. Needs
matplotlib (optional).
"""

import importlib.util
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from fastllama.benchmarks.result_file import ResultFile
from fastllama.benchmarks.runners import OURS
from fastllama.benchmarks.statistics import GIGA, MICRO, MILLI, percentile
from fastllama.benchmarks.tables import Record

DECODE_NAMES = ("throughput", "launches", "latency")
NAMES = (*DECODE_NAMES, "requests", "speculate")
NOT_INSTALLED = "no plots: matplotlib is not installed (pip install matplotlib)"
PANEL_INCHES = (5.2, 4.0)
DOTS_PER_INCH = 110
BINS = 40
LATENCY_TAIL = 99.5  # percentile where the axis ends, so that one outlier does not compress the rest
LEGEND_LINE = 0.12  # space above the highest bar for one line of the legend, as a share of the bar
LEAST_MS = 1e-3  # shortest axis of latencies
OURS_COLOR, LIMIT_COLOR = "#c0392b", "#555555"
# Colors that red-green color-blind people can distinguish.
PEER_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442")
LAUNCH_COLORS = ("#bbbbbb", "#0072b2", "#e69f00", "#009e73", "#c0392b", "#56b4e9", "#cc79a7", "#444444")
COLLECTIVE_COLORS = ("#f0e442", "#888800")  # of the collectives of processes that share a model

Panel = Callable[[Any, list[Record]], None]  # draws records on axes


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(result: ResultFile, folder: Path) -> list[Path]:
    """Write the plots of the result's decode and requests records into `folder`, which is created -> their paths."""
    decode = [record for record in result.records if record["suite"] == "decode" and "itls" in record]
    requests = [record for record in result.records if record["suite"] == "requests"]
    paths = []
    if decode:
        panels = dict(zip(DECODE_NAMES, (_throughput, _launches, _latency), strict=True))
        paths += [_draw(result, decode, folder / f"{name}.png", panel) for name, panel in panels.items()]
    if requests:
        paths.append(_draw(result, requests, folder / "requests.png", _requests))
    if speculate := [one for one in result.records if one["suite"] == "speculate" and "ratio" in one]:
        paths.append(_draw(result, speculate, folder / "speculate.png", _speculate))
    return paths


def _draw(
    result: ResultFile, records: Sequence[Record], path: Path, panel: Callable[[Any, list[Record]], None]
) -> Path:
    """Write one plot, with a panel for each context."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    contexts = list(dict.fromkeys(record["context"] for record in records))
    path.parent.mkdir(parents=True, exist_ok=True)
    # pyplot is not used, because it has global state and needs a display.
    figure = Figure(figsize=(PANEL_INCHES[0] * len(contexts), PANEL_INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(contexts), squeeze=False)[0]
    for axis, context in zip(axes, contexts, strict=True):
        of_context = [record for record in records if record["context"] == context]
        panel(axis, sorted(of_context, key=lambda record: record["batch"]))
    if panel is not _latency:  # its panels have their own legends
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, reverse=True)
    first, environment = records[0], result.environment
    figure.suptitle(f"{first['model']} in {first['dtype']} on {environment.device_name}", fontsize=10)
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    return path


def _throughput(axis: Any, records: Sequence[Record]) -> None:
    """Tokens per second by batch size: ours, the peers', and the limit set by reading a step's bytes."""
    batches = [record["batch"] for record in records]
    limits = [
        record["batch"] * record["read_gb_per_second"]["p50"] * GIGA / record["bytes_per_step"] for record in records
    ]
    axis.plot(batches, limits, color=LIMIT_COLOR, linestyle="--", marker="_", label="limit: read bandwidth")
    _all_rates(axis, records)
    axis.set(xlabel="batch", ylabel="tokens/s", title=_title(records))


def _requests(axis: Any, records: Sequence[Record]) -> None:
    """Tokens per second by the number of requests at a time: ours and the peers'."""
    _all_rates(axis, records)
    axis.set(xlabel="requests at a time", ylabel="tokens/s, of answers", title=f"prompts up to {records[0]['context']}")


def _speculate(axis: Any, records: Sequence[Record]) -> None:
    """The speed-up of each task with its range, by the share of guesses that were right."""
    kinds: dict[bool | None, tuple[str, str, str]] = {
        True: ("tasks that copy", "o", OURS_COLOR),
        False: ("others", "s", PEER_COLORS[0]),
        None: ("both together", "^", PEER_COLORS[1]),
    }
    for copies, (label, marker, color) in kinds.items():
        ratios = [(100 * record["acceptance"], record["ratio"]) for record in records if record["copies"] is copies]
        if ratios:
            middle = [ratio["p50"] for _, ratio in ratios]
            low = [ratio["p50"] - ratio["minimum"] for _, ratio in ratios]
            high = [ratio["maximum"] - ratio["p50"] for _, ratio in ratios]
            shares = [share for share, _ in ratios]
            axis.errorbar(shares, middle, [low, high], fmt=marker, color=color, capsize=2, label=label)
    axis.axhline(1, color=LIMIT_COLOR, linestyle="--", linewidth=1, label="without guesses")
    axis.set(xlabel="% of the guesses right", ylabel="times the tokens/s without guesses")
    axis.set(xlim=(-2, 102), ylim=(0, None))


def _all_rates(axis: Any, records: Sequence[Record]) -> None:
    """Curves of ours and of the peers, on logarithmic axes."""
    from matplotlib.ticker import LogLocator

    batches = [record["batch"] for record in records]
    _rates(axis, batches, records, OURS, OURS_COLOR)
    peers = [(name, record["batch"], peer) for record in records for name, peer in record["peers"].items()]
    measured = [peer for peer in peers if peer[2]["status"] == "measured"]
    for name, color in zip(dict.fromkeys(peer[0] for peer in measured), cycle(PEER_COLORS)):
        points = [(batch, record) for peer, batch, record in measured if peer == name]
        _rates(axis, [batch for batch, _ in points], [record for _, record in points], name, color)
    axis.set_yscale("log")
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)


def _rates(axis: Any, batches: Sequence[int], records: Sequence[Record], name: str, color: str) -> None:
    rates = [record["tokens_per_second"] for record in records]
    middle = [rate["p50"] for rate in rates]
    below, above = ([abs(rate[end] - rate["p50"]) for rate in rates] for end in ("minimum", "maximum"))
    axis.errorbar(batches, middle, yerr=[below, above], color=color, marker="o", capsize=3, label=name)


def _launches(axis: Any, records: Sequence[Record]) -> None:
    """Two stacked bars of a step's launches for each case: measured and least times."""
    ticks, labels, top = [], [], 0.0
    for place, record in enumerate(records):
        for offset, key in ((-0.2, "microseconds"), (0.2, "least_microseconds")):
            bottom = 0.0
            for launch, color in zip(record["launches"], cycle(LAUNCH_COLORS + COLLECTIVE_COLORS)):
                one = launch[key]["p50"] if key == "microseconds" else launch[key]
                height = one * launch["count"] * MILLI / MICRO
                label = f"{launch['launch']} x{launch['count']}" if not place and key == "microseconds" else None
                axis.bar(place + offset, height, 0.36, bottom=bottom, color=color, label=label)
                bottom += height
            top = max(top, bottom)
            ticks.append(place + offset)
            labels.append("measured" if key == "microseconds" else "least")
        axis.text(place, -0.16, f"batch {record['batch']}", ha="center", transform=axis.get_xaxis_transform())
    axis.set_xticks(ticks, labels, fontsize=7)
    axis.set(ylabel="ms a step", title=_title(records), ylim=(0, top * 1.05))


def _latency(axis: Any, records: Sequence[Record]) -> None:
    """Histograms of our inter-token latencies for each batch, with p50 and p99."""
    flat = {record["batch"]: [MILLI * one for run in record["itls"] for one in run] for record in records}
    top = 0.0
    end = max(*(percentile(samples, LATENCY_TAIL) for samples in flat.values()), LEAST_MS)
    for (batch, samples), color in zip(flat.items(), cycle((OURS_COLOR, *PEER_COLORS))):
        middle, tail = (percentile(samples, percent) for percent in (50, 99))
        label = f"batch {batch}: p50 {middle:.3g}, p99 {tail:.3g} ms"
        counts, _, _ = axis.hist(samples, bins=BINS, range=(0, end), histtype="stepfilled", color=color, alpha=0.2)
        axis.hist(samples, bins=BINS, range=(0, end), histtype="step", color=color, label=label)
        top = max(top, *counts)
        axis.axvline(middle, color=color, linewidth=1.5)
        axis.axvline(tail, color=color, linewidth=1, linestyle=":")
    axis.set(xlabel="ms between tokens", ylabel="tokens", title=_title(records), xlim=(0, end))
    axis.set_ylim(0, top * (1 + LEGEND_LINE * len(flat)))
    axis.legend(fontsize=8, loc="upper left")


def _title(records: Sequence[Record]) -> str:
    return f"context {records[0]['context']}"
