"""A tiny model, two cases and a scripted runner, shared by several test files."""

from typing import Any

import torch

from fastllama.benchmarks.child_process import ChildError
from fastllama.benchmarks.models import ModelSource, ModelSpec
from fastllama.benchmarks.runners import Run
from fastllama.benchmarks.suites.interleaved import Case

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 600, "multiple_of": 16}
SOURCE = ModelSource("tiny", shape=SHAPE)
SPEC = ModelSpec(SOURCE, CPU, torch.float32, max_batch_size=3, max_seq_len=32)
ARGS = SPEC.args
CASE = Case("decode", batch=2, context=5, steps=4, rounds=2)
RAGGED = Case("generate", batch=3, context=12, steps=4, rounds=1)


class Scripted:
    """A runner with given tokens and times, which logs its runs: "name?" with log-probabilities, else "name"."""

    def __init__(self, name: str, step_seconds: float, log: list[str], tokens: int = 7, fails_at: int = -1) -> None:
        self.name, self.step_seconds, self.log, self.token, self.fails_at = name, step_seconds, log, tokens, fails_at
        self.calls = 0

    def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run:
        self.calls += 1
        if self.calls == self.fails_at:
            raise ChildError("it broke")
        self.log.append(self.name + ("?" if logprobs else ""))
        rows = [[self.token] * steps for _ in prompts]
        scores = [[-1.0] * steps for _ in prompts]
        seconds = [0.5 + step * self.step_seconds for step in range(steps)]
        return Run(rows, seconds, scores, [[1.0] * steps for _ in prompts]) if logprobs else Run(rows, seconds)
