"""What is timed: greedy generation by ours or by a peer, and the result of one run."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from fastllama.benchmarks.timing import synchronize
from fastllama.generation import Llama

OURS = "fastllama"


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


@contextlib.contextmanager
def _without_stop_tokens(llm: Llama) -> Iterator[None]:
    kept = llm.tokenizer.stop_tokens
    llm.tokenizer.stop_tokens = set()
    try:
        yield
    finally:
        llm.tokenizer.stop_tokens = kept
