"""Our reference backend behind torch.compile as a peer: the layers, the head and the choice, each compiled whole.

Weights are plain row-major ones, for the compiler knows no other layout; everything around the model is our own.
"""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastllama.benchmarks.models import Run
from fastllama.benchmarks.models import build as build_ours
from fastllama.benchmarks.peer_process import Generate, main, margins_of, model_of
from fastllama.benchmarks.rounds import Ours
from fastllama.kernels import reference
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.ragged import Workspace
from fastllama.model import Transformer
from fastllama.slots import slots


def build(request: dict[str, Any]) -> Generate:
    """The model that `request` describes, compiled."""
    source, device, dtype = model_of(request)
    args = source.args(request["max_batch_size"], request["max_seq_len"])
    llm = build_ours(source, args, device, dtype, "reference")
    ops = _compile(llm.model)
    return partial(generate, Ours(llm), ops)


# What a model asks its backend for, but for the choice.
OPS = ("embed", "qkv", "attention", "project", "swiglu", "head", "suits_graphs", "pack", "unpack", "workspace")


class _Ops(SimpleNamespace):
    """The reference's ops, with a compiled choice that can be asked what the best logits' leads were."""

    def __init__(self) -> None:
        super().__init__(**{name: getattr(reference, name) for name in OPS})
        self.margins: list[list[float]] | None = None  # of each choice, row by row, where they are wanted
        self._choose = torch.compile(reference.choose)

    def choose(self, logits: Tensor, state: DecodeState, workspace: Workspace | None = None) -> None:
        if self.margins is not None:
            self.margins.append(margins_of(logits))
        self._choose(logits, state, workspace)


def _compile(model: Transformer) -> _Ops:
    for slot in slots(model, model.layers):
        weight = getattr(slot.owner, slot.attribute).detach()
        if weight.is_mkldnn:
            setattr(slot.owner, slot.attribute, nn.Parameter(weight.to_dense(), requires_grad=False))
    ops = _Ops()
    model.ops = cast(Any, ops)
    for name in ("hidden", "logits"):
        setattr(model, name, torch.compile(getattr(model, name)))
    return ops


def generate(ours: Ours, ops: _Ops, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run:
    """`steps` greedy tokens for each of `prompts`."""
    ops.margins = [] if with_logprobs else None
    found = ours.run(prompts, steps, with_logprobs)
    if ops.margins is None:
        return found
    # Steps that were queued beyond the last are nobody's.
    return replace(found, margins=[list(row) for row in zip(*ops.margins[:steps], strict=True)])


if __name__ == "__main__":
    sys.exit(main(build))
