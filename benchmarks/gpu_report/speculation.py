"""A section of a GPU report: what a step costs that checks guesses, beside a plain one.

The models have random weights, so few guesses are right, and the cost does not depend on it. From the cost follow the
tokens per second for any share of right guesses.
"""

import gc
from dataclasses import replace

import torch

from fastllama.benchmarks.gpu_report.measurements import Bench, Record, Results, random_model, rate
from fastllama.benchmarks.gpu_report.sizes import ends
from fastllama.benchmarks.statistics import MILLI, percentile
from fastllama.decode_graph import Decoder
from fastllama.draft import DraftGuesser
from fastllama.kernels.guesses import MAX_GUESSES
from fastllama.speculation import MAX_CHECKED_TOKENS, Guesser, LookupGuesser
from fastllama.speculation_limits import expected_tokens

GOALS = {4: 1.10}  # by guesses of one row: steps that check looked-up guesses, in plain steps
RIGHT = 0.7  # the share of right guesses for which tokens a second are given


def speculation(bench: Bench) -> Results:
    """Looked-up guesses with every model, and the smallest model as a draft for the largest."""
    sizes = bench.sizes
    names = list(sizes.models)
    for name in names:
        for batch in ends(sizes.batches):
            yield from _kinds(bench, name, batch, None, LookupGuesser(bench.model(name)))
    args = replace(sizes.models[names[-1]], max_batch_size=max(sizes.batches), max_seq_len=sizes.positions)
    draft = random_model(args, bench.device)
    yield from _kinds(bench, names[0], 1, names[-1], DraftGuesser(bench.model(names[0]), draft))
    del draft
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _kinds(bench: Bench, name: str, batch: int, draft: str | None, guesser: Guesser) -> Results:
    """Every number of guesses that steps of so many rows may check, in turn with plain steps."""
    sizes, model = bench.sizes, bench.model(name)
    counts = [k for k in sizes.guesses if (k + 1) * batch <= MAX_CHECKED_TOKENS and k <= MAX_GUESSES]
    decoders = {0: Decoder(model)} | {k: Decoder(model, guesser=guesser, n_guesses=k) for k in counts}
    runs: dict[int, list[Record]] = {k: [] for k in decoders}
    for _ in range(sizes.rounds):
        for k, decoder in decoders.items():
            runs[k].append(rate(bench, name, decoder, batch, sizes.contexts[0]))
    step = {k: percentile([run["step_milliseconds"] for run in found], 50) for k, found in runs.items()}
    for k in counts:
        yield {
            "model": name,
            "draft": draft,
            "batch": batch,
            "guesses": k,
            "step_milliseconds": step[k],
            "plain_milliseconds": step[0],
            "cost": step[k] / step[0],
            "goal": GOALS.get(k) if batch == 1 and draft is None else None,
            "guess_milliseconds": MILLI * decoders[k].graphs.timer.seconds * (k if guesser.cost else 1),
            f"tokens_per_second_at_{RIGHT:.0%}": batch * expected_tokens(RIGHT, k) / step[k] * MILLI,
        }
