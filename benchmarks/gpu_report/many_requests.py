"""A section of a GPU report: many requests through the engine, at several numbers of them at a time.

A step that only decodes is compared with a step of the decoder alone on as many rows: the difference is what the engine
adds. `host_milliseconds` is the host's work in such a step. As long as it takes less than the step, replays follow each
other without a gap.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fastllama.benchmarks.gpu_report.measurements import Bench, Record, Results, median_rate, random_model
from fastllama.benchmarks.models import LEAST_VOCABULARY, random_tokenizer
from fastllama.benchmarks.runners import FixedBatches, OurEngine, ServedRun, Workload, steps_of
from fastllama.benchmarks.statistics import MILLI, percentile
from fastllama.benchmarks.suites.requests import FIXED, RequestsCase, latencies
from fastllama.engine import Request
from fastllama.generation import Llama
from fastllama.warmup import warm_up


def many_requests(bench: Bench) -> Results:
    """The first model, with random weights and a cache for its own: ragged requests, and the same in fixed batches."""
    sizes, device = bench.sizes, bench.device
    name, args = next(iter(sizes.models.items()))
    most = max(sizes.requests_at_a_time)
    longest = sizes.longest_prompt + sizes.longest_answer
    args = replace(args, max_batch_size=most, max_seq_len=max(longest, _context(bench) + sizes.decoded))
    model = random_model(replace(args, vocab_size=max(args.vocab_size, LEAST_VOCABULARY)), device)
    llm = Llama(model, random_tokenizer(model.vocab_size))
    start = time.perf_counter()
    warm_up(llm.decoder, range(1, most + 1), progress=False)
    for at_a_time in sizes.requests_at_a_time:  # the kernels of prompts of all lengths
        OurEngine(llm).serve(_workload(bench, at_a_time, model.vocab_size, at_a_time))
    yield {"model": name, "program": "warm-up", "seconds": time.perf_counter() - start}
    for at_a_time in sizes.requests_at_a_time:
        workload = _workload(bench, at_a_time, model.vocab_size, sizes.requests)
        record = _figures(name, "engine", workload, OurEngine(llm).serve(workload)) | _step_times(llm, workload)
        alone = median_rate(bench, name, llm.decoder, at_a_time, _context(bench))["step_milliseconds"]
        yield record | {"decoder_step_milliseconds": alone}
    workload = _workload(bench, min(sizes.requests_at_a_time), model.vocab_size, sizes.requests)
    yield _figures(name, FIXED, workload, FixedBatches(llm).serve(workload))
    del llm, model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _workload(bench: Bench, at_a_time: int, vocab_size: int, n_requests: int) -> Workload:
    sizes = bench.sizes
    case = RequestsCase("requests", at_a_time, sizes.longest_prompt, sizes.longest_answer, requests=n_requests)
    return case.workload(vocab_size, 0)


def _context(bench: Bench) -> int:
    """The context of the decoder's steps: about the mean of the requests'."""
    return max(1, bench.sizes.longest_prompt // 3)


def _figures(model: str, program: str, workload: Workload, run: ServedRun) -> Record:
    """Tokens per second, and latencies as vLLM defines them."""
    n_tokens = sum(workload.output_lens)
    first, _, between, whole = (
        [MILLI * second for one in latencies(run) for second in one[place]] for place in range(4)
    )
    return {
        "model": model,
        "program": program,
        "batch": workload.max_concurrency,
        "requests": len(workload.prompts),
        "tokens_per_second": n_tokens / run.duration,
        "seconds": run.duration,
        "median_ttft_ms": percentile(first, 50),
        "p99_itl_ms": percentile(between or [0.0], 99),
        "median_e2el_ms": percentile(whole, 50),
    }


def _step_times(llm: Llama, workload: Workload) -> Record:
    """Of steps in which all rows decode: the time from one to the next, and what of it the host works.

    Also the host's longest step, which has prompts.
    """
    llm.model.cache.pool.forget()
    waited = _Waiting(llm)
    requests: list[Request] = []
    steps: list[tuple[bool, float, float]] = []  # (whether all rows decoded, seconds, of them waiting)
    before: tuple[float, float] | None = None
    decodes = False
    try:
        for running in steps_of(llm.engine(), workload, requests):
            now = time.perf_counter(), waited.seconds
            if before is not None:
                steps.append((decodes, now[0] - before[0], now[1] - before[1]))
            before = now
            decoding = all(one.is_decoding for request in running for one in request.sequences)
            decodes = decoding and len(running) == workload.max_concurrency
    finally:
        waited.end()
    found = [(seconds, seconds - waiting) for all_decode, seconds, waiting in steps if all_decode]
    if not found:
        return {"decode_steps": 0}
    whole, host = zip(*found, strict=True)
    return {
        "decode_steps": len(found),
        "step_milliseconds": MILLI * percentile(whole, 50),
        "host_milliseconds": MILLI * percentile(host, 50),
        "host_p99_milliseconds": MILLI * percentile(host, 99),
        "longest_host_milliseconds": MILLI * max(seconds - waiting for _, seconds, waiting in steps),
    }


class _Waiting:
    """Counts the seconds that a Llama's decoder waits for the device."""

    def __init__(self, llm: Llama) -> None:
        self.seconds = 0.0
        self._decoder = llm.decoder
        self._receive: Callable[[], object] = llm.decoder.receive_newest
        self._decoder.receive_newest = self._timed  # type: ignore[method-assign, assignment]

    def _timed(self) -> object:
        start = time.perf_counter()
        try:
            return self._receive()
        finally:
            self.seconds += time.perf_counter() - start

    def end(self) -> None:
        """The decoder is as before."""
        self._decoder.receive_newest = self._receive  # type: ignore[method-assign, assignment]
