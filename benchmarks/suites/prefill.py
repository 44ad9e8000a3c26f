"""The prefill suite: the speed of prompts, measured as the time to the first token. Only one token is generated."""

from operator import itemgetter
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.runners import Run
from fastllama.benchmarks.statistics import TERA, latency, percentile, throughput
from fastllama.benchmarks.suites.interleaved import Case, CaseRuns
from fastllama.benchmarks.tables import Columns
from fastllama.speed_of_light import prefill, total_flops

COLUMNS: Columns = {
    "batch": itemgetter("batch"),
    "context": itemgetter("context"),
    "ttft ms p50": lambda record: f"{record['median_ttft_ms']:.1f}",
    "tokens/s": lambda record: f"{record['tokens_per_second']['p50']:.0f}",
    "TFLOP/s": lambda record: f"{record['tflops']:.3g}",
    "% of matmul": lambda record: f"{record['matmul_share'] * 100:.0f}%",
}


def record(case: Case, case_runs: CaseRuns, args: ModelArgs, dtype: torch.dtype, matmul: float) -> dict[str, Any]:
    """The figures of a case as JSON. Shares are of the rate `matmul`, in TFLOP/s.

    Only the flops that the answer needs count: logits that a peer computes for other positions do not.
    """
    flops = total_flops(prefill(args, dtype, case.lengths))

    def figures(runs: list[Run], ceilings: list[float], devices: int) -> dict[str, Any]:
        seconds = [run.seconds[0] for run in runs]
        tflops = flops / percentile(seconds, 50) / TERA
        return {
            **throughput(sum(case.lengths), seconds),
            **latency("ttft", seconds),
            "tflops": tflops,
            "matmul_share": tflops / (devices * matmul),
        }

    sizes = {"n_prompt": case.context, "n_gen": 0, "n_depth": 0, "flops": flops}
    return sizes | case_runs.record(figures, lambda run: run.seconds[0])
