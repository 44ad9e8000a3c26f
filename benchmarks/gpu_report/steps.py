"""Sections of a GPU report about whole decode steps: are they right, and what do they cost beyond their launches?"""

import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.benchmarks.gpu_report.sections import Bench, Found
from fastllama.benchmarks.gpu_report.tests import compiling
from fastllama.benchmarks.kernels_report.model_launches import Shape
from fastllama.benchmarks.models import RANDOM_SEED, random_tensors
from fastllama.benchmarks.statistics import MICRO
from fastllama.benchmarks.suites.step_launches import fill_cache, launch_times
from fastllama.decode_graph import Decoder, step
from fastllama.kernels.attention.decode import attention_decode
from fastllama.kernels.batch import RaggedBatch, SamplingTensors
from fastllama.kernels.decode_state import DecodeState
from fastllama.model import Transformer
from fastllama.prefill import prefill

# Small, but with every kernel of a step in it, of one token and of several.
CHECKED = Shape(n_layers=2, dim=64, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=512)
PROMPTS = ([5, 250, 17], [9], [31, 32])
CHECKED_STEPS = 4
PAIRS = (1, 2)  # of tiles of keys and values on their way: below 48 KB of shared memory, and above

Rows = list[list[int]]


def self_check(bench: Bench) -> Found:
    """A short greedy decode, replayed and dependent, against eager launches as usual and against the reference backend.

    Before anything is timed: whatever is wrong with graphs or dependent launches on a GPU shows here.
    """
    batches = (1, len(PROMPTS))
    start = time.perf_counter()
    with compiling(bench, [CHECKED], batches, [(True, True), (False, False)], prefills=False):
        pass  # in parallel, and waited for
    yield {"check": "compiled ahead", "seconds": time.perf_counter() - start}
    fused = _model(bench, torch.bfloat16, "fused")
    for n_rows in batches:
        plain = _greedy(Decoder(fused, graphs=False, dependent=False), n_rows)
        for name, decoder in (
            ("dependent launches, one by one", Decoder(fused, graphs=False)),
            ("ordinary launches in a graph", Decoder(fused, dependent=False)),
            ("dependent launches in a graph", Decoder(fused)),
        ):
            yield from _compared(name, decoder, plain, n_rows, "ordinary launches, one by one")
    # In half precision a near tie may fall to either side.
    fused, reference = (_model(bench, torch.float32, backend) for backend in ("fused", "reference"))
    for n_rows in batches:
        expected = _greedy(Decoder(reference, graphs=False), n_rows)
        yield from _compared("kernels in float32", Decoder(fused), expected, n_rows, "the reference backend")


def _compared(name: str, decoder: Decoder, expected: Rows, n_rows: int, against: str) -> Iterator[dict[str, Any]]:
    """What a decoder draws beside what it should. `dependent` is what was in force in the end."""
    possible = decoder.dependent
    rows = _greedy(decoder, n_rows)
    dependent = decoder.dependent
    yield {"check": name, "against": against, "rows": n_rows, "dependent": dependent, "equal": rows == expected}
    if possible and not dependent:
        what = f"{name} ({n_rows} rows) could not be captured and were replaced by ordinary ones: stderr says why"
        yield {"error": f"SELF-CHECK FAILED: {what}"}
    if rows != expected:
        what = f"{name} give {rows}, {against} {expected}"
        yield {"error": f"SELF-CHECK FAILED, so nothing below means much: {what}"[:500]}


def _model(bench: Bench, dtype: torch.dtype, backend: str) -> Transformer:
    positions = max(map(len, PROMPTS)) + CHECKED_STEPS + 2
    args = ModelArgs(**CHECKED.whole, max_batch_size=len(PROMPTS), max_seq_len=positions)
    model = Transformer(args, device=bench.device, dtype=dtype, backend=backend, init_weights=False)
    model.load_tensors(random_tensors(args, RANDOM_SEED, bench.device, dtype))
    return model


@torch.inference_mode()
def _greedy(decoder: Decoder, n_rows: int) -> Rows:
    """The tokens that each of the first prompts gains."""
    model, prompts = decoder.model, PROMPTS[:n_rows]
    sampling = SamplingTensors.of(0.0, 0.0, [(1, row, 0) for row in range(n_rows)], model.device)
    last = [len(prompt) + CHECKED_STEPS for prompt in prompts]
    with model.exclusively():
        decoder.start([prompt[-1] for prompt in prompts], [len(p) - 1 for p in prompts], last, [], sampling)
        with decoder.launch_context():
            logits, _ = prefill(model, prompts)
        decoder.sample_first(logits)
        gained = [one.tokens for one in decoder.receive()]
        for _ in range(CHECKED_STEPS):
            decoder.enqueue_steps()
            gained += [one.tokens for one in decoder.receive()]
    return [list(row) for row in zip(*(tokens[:n_rows] for tokens in gained), strict=True)]


def whole_steps(bench: Bench) -> Found:
    """A step as one graph, beside the sum of its launches, each timed in a chain of its own kind.

    What a launch does to those around it shows nowhere else. The question is attention's shared memory: above 48 KB the
    driver may divide a multiprocessor's memory anew at each of its boundaries, and leave the cache of the launches
    behind it smaller.
    """
    sizes = bench.sizes
    for name in sizes.models:
        model = bench.model(name)
        ops = model.ops
        ends = product((sizes.contexts[0], sizes.contexts[-1]), (sizes.batches[0], sizes.batches[-1]))
        for (context, batch), pairs in product(dict.fromkeys(ends), PAIRS):
            model.ops = cast(Any, _WithPairs(ops, pairs))
            try:
                yield from _whole_step(bench, name, model, batch, context, pairs)
            finally:
                model.ops = ops


class _WithPairs:
    """A backend whose decode attention has so many pairs of tiles on their way."""

    def __init__(self, ops: Any, pairs: int) -> None:
        self._ops, self._pairs = ops, pairs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attention(self, q: Tensor, cache_k: Tensor, cache_v: Tensor, batch: RaggedBatch) -> Tensor:
        scratch = cast(Any, batch.workspace).attention
        return attention_decode(q, cache_k, cache_v, batch.positions, scratch, self._pairs)


@torch.inference_mode()
def _whole_step(
    bench: Bench, name: str, model: Transformer, batch: int, context: int, pairs: int
) -> Iterator[dict[str, Any]]:
    times = launch_times(model, batch, context, repeats=bench.sizes.repeats)
    parts = sum(one.work.count * one.microseconds.p50 for one in times)
    # A step before capture, and one for every replay, each of which moves on.
    n_steps = 2 * bench.sizes.repeats + 8
    state = _state(model, batch, context, n_steps)
    with model.exclusively():
        fill_cache(model, batch, context)
        seconds = bench.median_seconds(lambda: step(model, state))
    yield {
        "model": name,
        "batch": batch,
        "context": context,
        "attention_pairs": pairs,
        "step_microseconds": MICRO * seconds,
        "sum_of_launches_microseconds": parts,
        "beyond_microseconds": MICRO * seconds - parts,
    }


def _state(model: Transformer, batch: int, context: int, n_steps: int) -> DecodeState:
    """Rows that draw the most likely token, at the end of a context, with room for so many steps in what they write."""
    state = DecodeState.of(batch, n_steps, model.vocab_size, model.device)
    sampling = SamplingTensors.of(0.0, 0.0, [(1, row, 0) for row in range(batch)], model.device)
    tokens: Sequence[int] = [row + 1 for row in range(batch)]
    last = min(context - 1 + n_steps, model.cache.max_seq_len - 1)
    state.set(tokens, [context - 1] * batch, [last] * batch, [], sampling)
    return state.with_greedy(greedy=True)
