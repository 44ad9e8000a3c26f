"""How fast prompts are taken in: the prefill suite. The time to the first token, which is all that is generated."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.measure import MILLI, TERA, Ceiling, percentile, summarize
from fastllama.benchmarks.models import Run
from fastllama.benchmarks.rounds import Case, Measured, notes, peer_names, versus
from fastllama.benchmarks.tables import aligned
from fastllama.speed_of_light import prefill, total_flops


def record(case: Case, measured: Measured, args: ModelArgs, dtype: torch.dtype, matmul: Ceiling) -> dict[str, Any]:
    """What the rounds of a case came to, ready for JSON. Shares are of the matmul rate.

    Flops are those that the answer needs: a peer that computes the logits of every position gets no credit for them.
    """
    flops = total_flops(prefill(args, dtype, case.lengths))

    def figures(runs: list[Run], ceilings: list[float]) -> dict[str, Any]:
        seconds = [run.seconds[0] for run in runs]
        tflops = flops / percentile(seconds, 50) / TERA
        return {
            "ttft_ms": asdict(summarize(MILLI * second for second in seconds)),
            "prompt_tokens_per_second": asdict(summarize(sum(case.lengths) / second for second in seconds)),
            "tflops": tflops,
            "matmul_share": tflops / matmul.value,
        }

    return {"flops": flops, **measured.record(figures, lambda run: run.seconds[0])}


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records for people."""
    peers = peer_names(records)
    head = ["batch", "context", "ttft ms p50", "tokens/s", "TFLOP/s", "% of matmul"]
    rows: list[list[object]] = [[*head, *(f"vs {name}" for name in peers)]]
    for record in records:
        rows.append(
            [
                record["batch"],
                record["context"],
                f"{record['ttft_ms']['p50']:.1f}",
                f"{record['prompt_tokens_per_second']['p50']:.0f}",
                f"{record['tflops']:.3g}",
                f"{record['matmul_share'] * 100:.0f}%",
                *(versus(record, name) for name in peers),
            ]
        )
    return "\n".join([aligned(rows), *notes(records)])
