"""The requests suite: many requests of different lengths, a given number of them at a time.

Lengths are drawn log-uniformly: as many answers have 8 to 16 tokens as 128 to 256. They are the same in every case and
round; the prompts are new in each, so that no cache of an earlier round helps. A request's latencies begin when
it is submitted, which is when an earlier one has ended.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch

from fastllama.benchmarks.runners import ServedRun, Workload
from fastllama.benchmarks.statistics import latency, percentile, summarize, throughput
from fastllama.benchmarks.suites.interleaved import PROMPT_SEED, Case, CaseRuns
from fastllama.benchmarks.tables import Columns, Record

FIXED = "fixed-8"  # our fixed batches, among the peers
DEFAULT_REQUESTS = 64
SHORTEST = 8  # tokens of a prompt, and of an answer
LENGTHS_SEED = 19
MAX_ROUNDS = 1000  # for each number of requests at a time, seeds of prompts
LATENCIES = ("ttft", "tpot", "itl", "e2el")

COLUMNS: Columns = {
    "rows": itemgetter("batch"),
    "at a time": itemgetter("max_concurrency"),
    "tokens/s": lambda record: f"{record['output_throughput']:.1f}",
    "ttft ms p50": lambda record: f"{record['median_ttft_ms']:.0f}",
    "p99": lambda record: f"{record['p99_ttft_ms']:.0f}",
    "tpot ms p50": lambda record: f"{record['median_tpot_ms']:.1f}",
    "itl ms p99": lambda record: f"{record['p99_itl_ms']:.1f}",
    "e2el s p50": lambda record: f"{record['median_e2el_ms'] / 1e3:.2f}",
    "cached": lambda record: f"{record['cached_tokens']:.0f}",
}


@dataclass(frozen=True)
class RequestsCase(Case):
    """`requests` requests in `batch` rows: prompts of 8 to `context` tokens, answers of 8 to `steps`.

    prefix: tokens that all prompts begin with, in addition. clients: requests at a time; 0: as many as rows.
    """

    requests: int = DEFAULT_REQUESTS
    prefix: int = 0
    clients: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("requests", 1), ("prefix", 0), ("clients", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def label(self) -> str:
        return f"{self.requests} requests, {self.concurrency} at a time in {self.batch} rows, context {self.context}"

    @property
    def concurrency(self) -> int:
        """Requests at a time."""
        return self.clients or self.batch

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each prompt, with the common prefix."""
        return [self.prefix + length for length, _ in self._drawn_lengths()]

    @property
    def output_lens(self) -> list[int]:
        """The number of tokens of each answer."""
        return [length for _, length in self._drawn_lengths()]

    def workload(self, vocab_size: int, index: int) -> Workload:
        """The requests of round `index`: random token ids, the same on every call."""
        generator = torch.Generator().manual_seed(PROMPT_SEED + MAX_ROUNDS * self.batch + index)
        ids = torch.randint(vocab_size, (self.requests, self.prefix + self.context), generator=generator)
        ids[:, : self.prefix] = ids[0, : self.prefix].clone()
        prompts = [row[:length] for row, length in zip(ids.tolist(), self.lengths, strict=True)]
        return Workload(prompts, self.output_lens, self.concurrency)

    def run(self, runner: Any, vocab_size: int, index: int, logprobs: bool = False) -> Any:
        """Run the case on a Server -> its ServedRun. index: 0 to compare outputs, then the round."""
        return runner.serve(self.workload(vocab_size, index), logprobs)

    def _drawn_lengths(self) -> list[tuple[int, int]]:
        """(of the prompt's own tokens, of the answer), for each request."""
        generator = torch.Generator().manual_seed(LENGTHS_SEED)
        drawn = torch.rand(self.requests, 2, generator=generator, dtype=torch.float64).tolist()
        return [(_log_uniform(first, self.context), _log_uniform(second, self.steps)) for first, second in drawn]


def _log_uniform(drawn: float, longest: int) -> int:
    """A length from SHORTEST to longest, for a number between 0 and 1."""
    least = math.log(min(SHORTEST, longest))
    return round(math.exp(least + drawn * (math.log(longest) - least)))


def record(case: RequestsCase, case_runs: CaseRuns) -> Record:
    """The figures of a case as JSON. Throughputs are of the median run, latencies of all runs' requests together."""
    input_lens, output_lens = case.lengths, case.output_lens
    n_input, n_output = sum(input_lens), sum(output_lens)

    def figures(runs: list[ServedRun], _: list[float], devices: int) -> dict[str, Any]:
        durations = [run.duration for run in runs]
        median = percentile(durations, 50)
        found = {
            "seconds": asdict(summarize(durations)),
            **throughput(n_output, durations),
            "duration": median,
            "request_throughput": case.requests / median,
            "output_throughput": n_output / median,
            "total_token_throughput": (n_input + n_output) / median,
        }
        samples = [one for run in runs for one in latencies(run)]
        for place, name in enumerate(LATENCIES):
            found |= latency(name, [second for one in samples for second in one[place]] or [0.0])  # as vLLM's
        for name in ("cached_tokens", "preemptions"):
            counts = [count for run in runs if (count := getattr(run, name)) is not None]
            found[name] = percentile(counts, 50) if counts else None
        return found

    sizes = {
        "num_prompts": case.requests,
        "max_concurrency": case.concurrency,
        "input_lens": input_lens,
        "output_lens": output_lens,
        "total_input_tokens": n_input,
        "total_output_tokens": n_output,
    }
    return sizes | case_runs.record(figures, lambda run: run.duration)


def latencies(run: ServedRun) -> Iterator[tuple[list[float], list[float], list[float], list[float]]]:
    """The seconds of each request, as vLLM's benchmark defines them: time to the first token, mean time of a later
    token, times between tokens, and time to the last one. An answer of one token has only the first and the last.
    """
    for tokens, start, times in zip(run.tokens, run.starts, run.times, strict=True):
        later = [(times[-1] - times[0]) / (len(tokens) - 1)] if len(tokens) > 1 else []
        yield [times[0] - start], later, [second - first for first, second in pairwise(times)], [times[-1] - start]
