"""Sections of a GPU report about complete decode steps: are they correct, and what do they cost?"""

import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.benchmarks.gpu_report.measurements import (
    Bench,
    Record,
    Results,
    decode_steps,
    random_model,
    sampling_tensors,
)
from fastllama.benchmarks.gpu_report.run_tests import compile_ahead
from fastllama.benchmarks.gpu_report.sizes import ends
from fastllama.benchmarks.suites.step_launches import fill_cache, launch_times
from fastllama.decode_graph import Decoder
from fastllama.kernels.attention.decode import attention_decode
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.paged_cache import LayerCache
from fastllama.model import Transformer
from fastllama.prefill import prefill
from fastllama.step_graphs import step

PROMPTS = ([5, 250, 17], [9], [31, 32])
CHECKED_STEPS = 4
# A small model whose steps have every kernel, for one token and for several.
CHECKED = ModelArgs(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=96,
    vocab_size=512,
    max_batch_size=len(PROMPTS),
    max_seq_len=max(map(len, PROMPTS)) + CHECKED_STEPS + 2,
)
PAIRS = (1, 2)  # of tiles of keys and values in flight: below 48 KB of shared memory, and above

Rows = list[list[int]]


def self_check(bench: Bench) -> Results:
    """Compares greedy tokens of graphs and dependent launches with those of eager ordinary launches and of the
    reference backend.

    It runs before anything is timed, because it shows whether graphs and dependent launches work on this GPU.
    """
    batches = (1, len(PROMPTS))
    start = time.perf_counter()
    with compile_ahead(bench, [CHECKED], batches, [(True, True), (False, False)], prefills=False):
        pass  # the end of the block waits for the compilation
    yield {"check": "compiled ahead", "seconds": time.perf_counter() - start}
    fused = random_model(CHECKED, bench.device)
    for n_rows in batches:
        plain = _greedy(Decoder(fused, graphs=False, dependent=False), n_rows)
        for name, decoder in (
            ("dependent launches, one by one", Decoder(fused, graphs=False)),
            ("ordinary launches in a graph", Decoder(fused, dependent=False)),
            ("dependent launches in a graph", Decoder(fused)),
        ):
            yield from _compared(name, decoder, plain, n_rows, "ordinary launches, one by one")
    # In half precision the backends may decide a near tie differently.
    fused, reference = (random_model(CHECKED, bench.device, torch.float32, name) for name in ("fused", "reference"))
    for n_rows in batches:
        expected = _greedy(Decoder(reference, graphs=False), n_rows)
        yield from _compared("kernels in float32", Decoder(fused), expected, n_rows, "the reference backend")


def _compared(name: str, decoder: Decoder, expected: Rows, n_rows: int, against: str) -> Iterator[Record]:
    """Whether a decoder generates the expected tokens. `dependent`: whether its launches are dependent afterwards."""
    possible = decoder.dependent
    rows = _greedy(decoder, n_rows)
    dependent = decoder.dependent
    yield {"check": name, "against": against, "rows": n_rows, "dependent": dependent, "equal": rows == expected}
    if possible and not dependent:
        what = f"{name} ({n_rows} rows) could not be captured and were replaced by ordinary ones: stderr says why"
        yield {"error": f"SELF-CHECK FAILED: {what}"}
    if rows != expected:
        what = f"{name} give {rows}, {against} {expected}"
        yield {"error": f"SELF-CHECK FAILED, so the results below are unreliable: {what}"[:500]}


@torch.inference_mode()
def _greedy(decoder: Decoder, n_rows: int) -> Rows:
    """The tokens that each of the first prompts generates."""
    model, prompts = decoder.model, PROMPTS[:n_rows]
    lengths = [len(prompt) for prompt in prompts]
    last = [length + CHECKED_STEPS for length in lengths]
    sampling = sampling_tensors(n_rows, model.device)
    with model.exclusively():
        decoder.start([prompt[-1] for prompt in prompts], [length - 1 for length in lengths], last, [], sampling)
        with decoder.launch_context():
            logits, _ = prefill(model, prompts)
        decoder.sample_first(logits)
        generated = [output.tokens[:n_rows] for output in decode_steps(decoder, CHECKED_STEPS)]
    return [list(row) for row in zip(*generated, strict=True)]


def whole_steps(bench: Bench) -> Results:
    """The time of a step as one graph, and the sum of its launches, which are timed by kind.

    Only a complete step shows how launches affect each other. This one is about attention's shared memory. Above 48 KB,
    the driver may change how a multiprocessor's memory is divided between shared memory and cache before and after each
    attention launch, and leave other launches less cache.
    """
    sizes = bench.sizes
    for name in sizes.models:
        model = bench.model(name)
        ops = model.ops
        for context, batch, pairs in product(ends(sizes.contexts), ends(sizes.batches), PAIRS):
            model.ops = _with_pairs(ops, pairs)
            try:
                yield from _whole_step(bench, name, model, batch, context, pairs)
            finally:
                model.ops = ops


def _with_pairs(ops: Any, pairs: int) -> Any:
    """The backend, with this number of pairs of tiles in flight in decode attention."""

    def attention(q: Tensor, cache: LayerCache, batch: Any) -> Tensor:
        return attention_decode(q, cache, batch.positions, batch.workspace.attention, pairs)

    return SimpleNamespace(**vars(ops) | {"attention": attention})


@torch.inference_mode()
def _whole_step(bench: Bench, name: str, model: Transformer, batch: int, context: int, pairs: int) -> Iterator[Record]:
    times = launch_times(model, batch, context, repeats=bench.sizes.repeats)
    parts = sum(one.work.count * one.microseconds.p50 for one in times)
    n_steps = 2 * bench.sizes.repeats + 8  # at least one before capture, and one for each replay
    last = min(context - 1 + n_steps, model.cache.max_seq_len - 1)
    state = _state(model, batch, context, n_steps, last)
    with model.exclusively():
        fill_cache(model, batch, last + 1)
        microseconds = bench.microseconds([partial(step, model, state)])
    yield {
        "model": name,
        "batch": batch,
        "context": context,
        "attention_pairs": pairs,
        "step_microseconds": microseconds,
        "sum_of_launches_microseconds": parts,
        "beyond_microseconds": microseconds - parts,
    }


def _state(model: Transformer, batch: int, context: int, n_steps: int, last: int) -> DecodeState:
    """Greedy rows at the end of a context, with output space for n_steps, that end at position `last`."""
    state = DecodeState.of(batch, n_steps, model.vocab_size, model.device)
    sampling = sampling_tensors(batch, model.device)
    state.set([row + 1 for row in range(batch)], [context - 1] * batch, [last] * batch, [], sampling)
    return state.with_greedy(greedy=True)
