"""The far side of a peer: a process that holds another implementation and generates on request.

Peers run apart so that neither side disturbs the other: each holds a thread pool and an allocator, and some want a
process group. The first line on stdin describes the model, each later line a generation; each gets one line of JSON
back. A peer's module builds and calls `main`; it is started by `peers.Peer`, not by hand.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from fastllama.benchmarks.models import ModelSource
from fastllama.benchmarks.runner import Run


class Generate(Protocol):
    """`steps` greedy tokens for each prompt; with the log-probabilities and margins, where they are asked for."""

    def __call__(self, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run: ...


RECOMPILE_LIMIT = 64  # prompts and steps of every case of a run

Build = Callable[[dict[str, Any]], Generate]


def model_of(request: dict[str, Any]) -> tuple[ModelSource, torch.device, torch.dtype]:
    """What the first line asks for. Sets the number of threads."""
    torch.set_num_threads(request["threads"])
    return ModelSource(**request["source"]), torch.device(request["device"]), getattr(torch, request["dtype"])


def scores_of(logits: Tensor, chosen: Tensor) -> tuple[list[float], list[float]]:
    """logits (B, V), chosen (B,) -> the chosen tokens' log-probabilities, and `margins_of` the logits."""
    scores = torch.log_softmax(logits.float(), dim=-1).gather(1, chosen[:, None])[:, 0]
    return scores.tolist(), margins_of(logits)


def margins_of(logits: Tensor) -> list[float]:
    """logits (B, V) -> the lead of each row's best over its second."""
    best = logits.topk(2, dim=-1).values
    found: list[float] = (best[:, 0] - best[:, 1]).tolist()
    return found


def compile_or_fail() -> None:
    """Make torch.compile fail where it would quietly go on uncompiled: past its limit of shapes for one function."""
    config: Any = torch._dynamo.config
    config.recompile_limit, config.fail_on_recompile_limit_hit = RECOMPILE_LIMIT, True


def answer(channel: IO[str], message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def serve(requests: IO[str], channel: IO[str], build: Build) -> int:
    """Answer until stdin ends. A failure is one `{"error": ...}` line, after which the process is of no more use."""
    try:
        generate = build(json.loads(requests.readline()))
        answer(channel, {"ready": True})
        for line in requests:
            request = json.loads(line)
            answer(channel, vars(generate(request["prompts"], request["steps"], request["logprobs"])))
    except Exception as error:
        answer(channel, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def main(build: Build) -> int:
    """Serve stdin."""
    # Libraries print to stdout as they start; the answers get a descriptor of their own, and what is printed goes to
    # stderr.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with channel:
        return serve(sys.stdin, channel, build)
