"""How fast prompts are taken in: the prefill suite. The time to the first token, which is all that is generated."""

from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.metrics import latency, throughput
from fastllama.benchmarks.peer_table import Columns
from fastllama.benchmarks.runner import Run
from fastllama.benchmarks.statistics import TERA, percentile
from fastllama.benchmarks.suites.comparison import Case, Measured
from fastllama.speed_of_light import prefill, total_flops

COLUMNS: Columns = {
    "batch": lambda record: record["batch"],
    "context": lambda record: record["context"],
    "ttft ms p50": lambda record: f"{record['median_ttft_ms']:.1f}",
    "tokens/s": lambda record: f"{record['tokens_per_second']['p50']:.0f}",
    "TFLOP/s": lambda record: f"{record['tflops']:.3g}",
    "% of matmul": lambda record: f"{record['matmul_share'] * 100:.0f}%",
}


def record(case: Case, measured: Measured, args: ModelArgs, dtype: torch.dtype, matmul: float) -> dict[str, Any]:
    """What the rounds of a case came to, ready for JSON. Shares are of the matmul rate, in TFLOP/s.

    Flops are those that the answer needs: a peer that computes the logits of every position gets no credit for them.
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
    return sizes | measured.record(figures, lambda run: run.seconds[0])
