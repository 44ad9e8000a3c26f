"""The generate suite: the time of a complete call, from prompts of different lengths to the last token of every row.

Meta's code feeds tokens beyond the shortest prompt one by one, other code pads on the left, ours runs all in one pass.
"""

from collections.abc import Mapping
from dataclasses import asdict
from operator import itemgetter
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.ceilings import machine_of
from fastllama.benchmarks.runners import Run
from fastllama.benchmarks.statistics import latency, percentile, summarize, throughput
from fastllama.benchmarks.suites.interleaved import Case, CaseRuns
from fastllama.benchmarks.tables import Columns
from fastllama.quantization import NOTHING_QUANTIZED, Scheme
from fastllama.speed_of_light import decode_step, least_seconds, prefill

COLUMNS: Columns = {
    "batch": itemgetter("batch"),
    "prompts": lambda record: f"{min(record['input_lens'])}-{max(record['input_lens'])}",
    "seconds p50": lambda record: f"{record['seconds']['p50']:.2f}",
    "tokens/s": lambda record: f"{record['tokens_per_second']['p50']:.1f}",
    "% of light": lambda record: f"{record['share'] * 100:.0f}%",
}


def record(
    case: Case,
    case_runs: CaseRuns,
    args: ModelArgs,
    dtype: torch.dtype,
    matmul: float,
    schemes: Mapping[str, Scheme] = NOTHING_QUANTIZED,
) -> dict[str, Any]:
    """The figures of a case as JSON. Shares are of the speed of light; `matmul` is the machine's rate in TFLOP/s."""
    mean_context = sum(case.lengths) / case.batch + case.steps / 2
    step = decode_step(args, dtype, case.batch, mean_context, schemes)
    n_generated = case.batch * case.steps

    def figures(runs: list[Run], ceilings: list[float], devices: int) -> dict[str, Any]:
        seconds = [run.seconds[-1] for run in runs]
        machine = machine_of(percentile(ceilings, 50), matmul, devices)
        least = least_seconds(prefill(args, dtype, case.lengths), machine)
        least += (case.steps - 1) * least_seconds(step, machine)  # the first token comes with the prompts
        median = percentile(seconds, 50)
        return {
            "seconds": asdict(summarize(seconds)),
            **throughput(n_generated, seconds),
            **latency("e2el", seconds),
            "output_throughput": n_generated / median,
            "total_token_throughput": (sum(case.lengths) + n_generated) / median,
            "least_seconds": least,
            "share": least / median,
        }

    sizes = {
        "input_lens": case.lengths,
        "total_input_tokens": sum(case.lengths),
        "total_output_tokens": n_generated,
    }
    return sizes | case_runs.record(figures, lambda run: run.seconds[-1])
