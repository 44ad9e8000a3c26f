"""The process of a peer, and what the peers share.

A peer has a process of its own so that its thread pool, allocator and process group do not affect ours.
"""

import importlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastllama.args import ROPE_FIELDS, ModelArgs
from fastllama.benchmarks.child_process import answer_requests
from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.runners import Run, ServedRun, Workload
from fastllama.benchmarks.timing import synchronize

RECOMPILE_LIMIT = 64  # shapes of one function; every case of a run has its own shape
HUGGINGFACE_ROPE_NAMES = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_seq_len": "original_max_position_embeddings",
    "rope_attention_factor": "attention_factor",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_truncate": "truncate",
}


class Generate(Protocol):
    """Generates `steps` greedy tokens for each prompt, on request with log-probabilities and margins."""

    def __call__(self, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run: ...


class Serve(Protocol):
    """Answers a workload, on request with log-probabilities (margins are not needed: ours are there)."""

    def __call__(self, workload: Workload, with_logprobs: bool) -> ServedRun: ...


class Recorder:
    """Records one generation. Its clock starts when it is created."""

    def __init__(self, n_rows: int, device: torch.device, with_logprobs: bool) -> None:
        self.seconds: list[float] = []
        self._device, self._with_logprobs = device, with_logprobs
        self._logprobs: list[list[float]] = [[] for _ in range(n_rows)]
        self._margins: list[list[float]] = [[] for _ in range(n_rows)]
        synchronize(device)
        self._start = time.perf_counter()

    def end_step(self) -> None:
        """Note the time at which every row has the token of a step."""
        synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._start)

    def add_scores(self, logprobs: list[float], margins: list[float], rows: Iterable[int] | None = None) -> None:
        """Keep one step's log-probabilities and margins, of all rows or only of `rows`."""
        for row in range(len(logprobs)) if rows is None else rows:
            self._logprobs[row].append(logprobs[row])
            self._margins[row].append(margins[row])

    def run(self, tokens: list[list[int]]) -> Run:
        if not self._with_logprobs:
            return Run(tokens, self.seconds)
        return Run(tokens, self.seconds, self._logprobs, self._margins)


def scores_of(logits: Tensor, chosen: Tensor) -> tuple[list[float], list[float]]:
    """logits (B, V), chosen (B,) -> the chosen tokens' log-probabilities and the margins."""
    scores = torch.log_softmax(logits.float(), dim=-1).gather(1, chosen[:, None])[:, 0]
    return scores.tolist(), margins_of(logits)


def margins_of(logits: Tensor) -> list[float]:
    """logits (B, V) -> each row's best logit minus its second best."""
    best = logits.topk(2, dim=-1).values
    margins: list[float] = (best[:, 0] - best[:, 1]).tolist()
    return margins


def compile_or_fail() -> None:
    """Make torch.compile raise at its limit of shapes for one function, instead of silently running uncompiled."""
    config: Any = torch._dynamo.config
    config.recompile_limit, config.fail_on_recompile_limit_hit = RECOMPILE_LIMIT, True


def unsupported_head_dim(code: str, args: ModelArgs) -> str | None:
    """The reason why code that derives head_dim from the width cannot run a model, or None."""
    if args.head_dim * args.n_heads == args.dim:
        return None
    widths = f"{args.head_dim} for {args.dim} / {args.n_heads}"
    return f"{code} needs head_dim = dim / n_heads, and this model has {widths}"


def unsupported_biases(code: str, args: ModelArgs) -> str | None:
    """The reason why code that has no biases cannot run this model, or None."""
    return f"{code} has no biases, and this model has" if args.attention_bias or args.mlp_bias else None


def unsupported_rope(code: str, args: ModelArgs, types: Sequence[str]) -> str | None:
    """The reason why code with these types of rope cannot run a model, or None."""
    if args.rope_type in types:
        return None
    return f"{code} has no rope of type {args.rope_type!r}, only {', '.join(types)}"


def rope_scaling(args: ModelArgs) -> dict[str, Any]:
    """The fields that the model's type of rope reads, in Hugging Face's names."""
    return {HUGGINGFACE_ROPE_NAMES[name]: getattr(args, name) for name in ROPE_FIELDS[args.rope_type]}


def main() -> int:
    """Build the model of the first request with the peer's module, then answer each later request with a Run.

    If the first one says "serves", later ones have a Workload and get a ServedRun.
    """
    generate: Generate | None = None
    serve: Serve | None = None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal generate, serve
        if serve is not None:
            return vars(serve(Workload(*request["workload"]), request["logprobs"]))
        if generate is not None:
            return vars(generate(request["prompts"], request["steps"], request["logprobs"]))
        peer, spec = importlib.import_module(request["module"]), ModelSpec.from_json(**request["model"])
        if request["serves"]:
            serve = peer.build_server(spec, request)
        else:
            generate = peer.build(spec, request)
        return {"ready": True}

    return answer_requests(answer)


if __name__ == "__main__":
    sys.exit(main())
