"""What is timed: greedy generation by ours or by a peer, of one batch or of many requests, and the result of a run."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fastllama.benchmarks.timing import synchronize
from fastllama.engine import Engine, Request, SamplingParams
from fastllama.generation import Llama

OURS = "fastllama"
FIXED_ROWS = 8  # requests in a fixed batch


@dataclass(frozen=True)
class Run:
    """The result of one greedy generation, with the same number of tokens in each row.

    `seconds[k]` is the time from the call until every row had its token k. `logprobs` and a peer's `margins` (the best
    logit minus the second best) are per row and step, and None if they were not requested.
    """

    tokens: list[list[int]]
    seconds: list[float]
    logprobs: list[list[float]] | None = None
    margins: list[list[float]] | None = None


class Runner(Protocol):
    """Generates `steps` greedy tokens for each prompt, and times each step."""

    def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run: ...


class Workload(NamedTuple):
    """Requests, all there from the beginning, answered greedily with a given number of tokens each."""

    prompts: list[list[int]]
    output_lens: list[int]
    max_concurrency: int  # requests at a time: the next one is submitted when one has ended


@dataclass(frozen=True)
class ServedRun:
    """The result of a Workload. Times are in seconds from the beginning of the run.

    `times` has, per request, when each token came, or each group of tokens that came at once. `logprobs` and `margins`
    are as in Run. What a program does not report is None.
    """

    tokens: list[list[int]]
    starts: list[float]  # when each request was submitted
    times: list[list[float]]
    logprobs: list[list[float]] | None = None
    margins: list[list[float]] | None = None
    cached_tokens: int | None = None  # of the prompts, that were found in the cache
    preemptions: int | None = None

    @property
    def duration(self) -> float:
        """The seconds until every request was answered."""
        return max(times[-1] for times in self.times)


class Server(Protocol):
    """Answers a Workload, and notes when each token came."""

    def serve(self, workload: Workload, logprobs: bool = False) -> ServedRun: ...


class Ours:
    """fastllama as a Runner, through `Llama.stream`, as users call it."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run:
        device = self._llm.model.device
        tokens: list[list[int]] = [[] for _ in prompts]
        scores: list[list[float]] = [[] for _ in prompts]
        seconds: list[float] = []
        with _without_stop_tokens(self._llm):
            synchronize(device)
            start = time.perf_counter()
            for increment in self._llm.stream(prompts, steps, temperature=0.0, logprobs=logprobs):
                tokens[increment.row] += increment.tokens
                scores[increment.row] += increment.logprobs or []
                # A step is complete when every row has its token.
                complete = min(len(row) for row in tokens)
                if complete > len(seconds):
                    seconds += [time.perf_counter() - start] * (complete - len(seconds))
        return Run(tokens, seconds, scores if logprobs else None)


class OurEngine:
    """fastllama's engine of requests as a Server, with the margins of its tokens. It begins with an empty cache."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    def serve(self, workload: Workload, logprobs: bool = False) -> ServedRun:
        self._llm.model.cache.pool.forget()
        engine = self._llm.engine()
        synchronize(self._llm.model.device)
        begin = time.perf_counter()
        requests: list[Request] = []
        for _ in steps_of(engine, workload, requests, logprobs):
            pass
        answers = [request.partial.answer for request in requests]
        margins = [[first[1] - second[1] for first, second, *_ in one.top_logprobs or []] for one in answers]
        return ServedRun(
            tokens=[one.tokens for one in answers],
            starts=[request.partial.times.arrival - begin for request in requests],
            times=[[second - begin for second in request.partial.times.tokens] for request in requests],
            logprobs=[one.logprobs or [] for one in answers] if logprobs else None,
            margins=margins if logprobs else None,
            cached_tokens=engine.stats.cached_tokens,
            preemptions=engine.stats.preemptions,
        )


def steps_of(
    engine: Engine, workload: Workload, requests: list[Request], logprobs: bool = False
) -> Iterator[list[Request]]:
    """Answer a workload. Adds its requests to `requests`, and yields those that are running before each step."""
    prompts, output_lens, max_concurrency = workload
    scored = 2 if logprobs else None  # of the two best tokens
    running: list[Request] = []
    while running or len(requests) < len(prompts):
        while len(running) < max_concurrency and len(requests) < len(prompts):
            length = output_lens[len(requests)]
            params = SamplingParams(max_gen_len=length, temperature=0.0, ignore_eos=True, logprobs=scored)
            requests.append(engine.submit(prompts[len(requests)], params))
            running.append(requests[-1])
        yield running
        engine.step()
        running = [request for request in running if not request.is_finished]


class FixedBatches:
    """`Llama.stream` as a Server: FIXED_ROWS requests at a time, the next ones when the longest answer is complete.

    Tokens beyond a request's own number are not counted, and a request has ended when its last counted token came.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    def serve(self, workload: Workload, logprobs: bool = False) -> ServedRun:
        prompts, output_lens, max_concurrency = workload
        n_rows = min(FIXED_ROWS, max_concurrency, self._llm.model.params.max_batch_size)
        n_requests = len(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]
        scores: list[list[float]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        starts: list[float] = []
        self._llm.model.cache.pool.forget()
        with _without_stop_tokens(self._llm):
            synchronize(self._llm.model.device)
            begin = time.perf_counter()
            for first in range(0, n_requests, n_rows):
                batch = slice(first, first + n_rows)
                starts += [time.perf_counter() - begin] * len(prompts[batch])
                stream = self._llm.stream(prompts[batch], max(output_lens[batch]), temperature=0.0, logprobs=logprobs)
                for increment in stream:
                    place = first + increment.row
                    if increment.tokens and len(tokens[place]) < output_lens[place]:
                        times[place].append(time.perf_counter() - begin)
                    tokens[place] += increment.tokens
                    scores[place] += increment.logprobs or []
        counted = [row[:length] for row, length in zip(tokens, output_lens, strict=True)]
        logs = [row[:length] for row, length in zip(scores, output_lens, strict=True)] if logprobs else None
        return ServedRun(counted, starts, times, logs, cached_tokens=0, preemptions=0)


@contextlib.contextmanager
def _without_stop_tokens(llm: Llama) -> Iterator[None]:
    kept = llm.tokenizer.stop_tokens
    llm.tokenizer.stop_tokens = set()
    try:
        yield
    finally:
        llm.tokenizer.stop_tokens = kept
