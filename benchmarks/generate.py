"""From prompts to answers: the generate suite. Ragged prompts, all of them answered, the whole call timed.

The case that separates the ways to batch: Meta's code feeds what is longer than the shortest prompt token by token,
others pad on the left, ours runs all prompts at once.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.measure import GIGA, TERA, Ceiling, percentile, summarize
from fastllama.benchmarks.models import Run
from fastllama.benchmarks.rounds import Case, Measured, notes, peer_names, versus
from fastllama.benchmarks.tables import aligned
from fastllama.speed_of_light import Machine, decode_step, least_seconds, prefill


def record(case: Case, measured: Measured, args: ModelArgs, dtype: torch.dtype, matmul: Ceiling) -> dict[str, Any]:
    """What the rounds of a case came to, ready for JSON. Shares are of the speed of light, prompts and steps."""
    mean_context = sum(case.lengths) / case.batch + case.steps / 2
    step = decode_step(args, dtype, case.batch, mean_context)

    def figures(runs: list[Run], ceilings: list[float]) -> dict[str, Any]:
        seconds = [run.seconds[-1] for run in runs]
        machine = Machine(read=percentile(ceilings, 50) * GIGA, matmul=matmul.value * TERA)
        least = least_seconds(prefill(args, dtype, case.lengths), machine)
        least += (case.steps - 1) * least_seconds(step, machine)  # the first token comes with the prompts
        return {
            "seconds": asdict(summarize(seconds)),
            "tokens_per_second": asdict(summarize(case.batch * case.steps / second for second in seconds)),
            "least_seconds": least,
            "share": least / percentile(seconds, 50),
        }

    lengths = {"prompt_lengths": case.lengths}
    return lengths | measured.record(figures, lambda run: run.seconds[-1])


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records for people."""
    peers = peer_names(records)
    head = ["batch", "prompts", "seconds p50", "tokens/s", "% of light"]
    rows: list[list[object]] = [[*head, *(f"vs {name}" for name in peers)]]
    for record in records:
        lengths = record["prompt_lengths"]
        rows.append(
            [
                record["batch"],
                f"{min(lengths)}-{max(lengths)}",
                f"{record['seconds']['p50']:.2f}",
                f"{record['tokens_per_second']['p50']:.1f}",
                f"{record['share'] * 100:.0f}%",
                *(versus(record, name) for name in peers),
            ]
        )
    return "\n".join([aligned(rows), *notes(records)])
