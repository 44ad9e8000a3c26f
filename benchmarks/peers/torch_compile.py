"""Our reference backend behind torch.compile as a peer: the layers, the head and the choice, each compiled whole.

Weights are plain row-major ones, for the compiler knows no other layout; a decode step reads the whole cache under a
mask, so that it is one program. Everything around the model is our own. Without CUDA graphs: the cache is written in
place, which torch.compile's own do not take.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastllama.benchmarks.models import build as build_ours
from fastllama.benchmarks.peers.worker import Generate, compile_or_fail, main, margins_of, model_of
from fastllama.benchmarks.runner import Ours, Run
from fastllama.kernels import reference
from fastllama.kernels.batch import RaggedBatch, Workspace
from fastllama.kernels.decode_state import DecodeState
from fastllama.model import Transformer
from fastllama.packed_weights import packed_weights


def build(request: dict[str, Any]) -> Generate:
    """The model that `request` describes, compiled."""
    source, device, dtype = model_of(request)
    args = source.args(request["max_batch_size"], request["max_seq_len"])
    llm = build_ours(source, args, device, dtype, "reference")
    compile_or_fail()
    return partial(generate, Ours(llm), compile_model(llm.model, partial(torch.compile, fullgraph=True)))


Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
# What a model asks its backend for, but for the choice.
OPS = (
    *("embed", "norm_qkv_rope_append", "attention", "linear_residual", "norm_swiglu", "norm_lm_head"),
    *("supports_cuda_graphs", "pack", "unpack", "workspace"),
)


class _Ops(SimpleNamespace):
    """The reference's ops, with a compiled choice that can be asked what the best logits' leads were."""

    def __init__(self, compiled: Compiler) -> None:
        super().__init__(**{name: getattr(reference, name) for name in OPS})
        self.margins: list[list[float]] | None = None  # of each choice, row by row, where they are wanted
        self._sample_and_advance = compiled(reference.sample_and_advance)

    def sample_and_advance(self, logits: Tensor, state: DecodeState, workspace: Workspace | None = None) -> None:
        if self.margins is not None:
            self.margins.append(margins_of(logits))
        self._sample_and_advance(logits, state, workspace)


def compile_model(model: Transformer, compiled: Compiler) -> _Ops:
    """Have the model's layers, head and choice go through `compiled`; its ops from then on."""
    for slot in packed_weights(model, model.layers):
        weight = getattr(slot.owner, slot.attribute).detach()
        if weight.is_mkldnn:
            setattr(slot.owner, slot.attribute, nn.Parameter(weight.to_dense(), requires_grad=False))
    ops = _Ops(compiled)
    model.ops = cast(Any, ops)
    hidden, max_seq_len = compiled(model.hidden), model.cache.max_seq_len
    model.hidden = lambda batch: hidden(_of_one_shape(batch, max_seq_len))  # type: ignore[method-assign]
    model.logits = compiled(model.logits)  # type: ignore[method-assign]
    return ops


def _of_one_shape(batch: RaggedBatch, max_seq_len: int) -> RaggedBatch:
    """A decode step over the whole cache, masked, for a compiler to which every length would be another program."""
    if batch.is_decode_step:
        segments = tuple(segment._replace(keys=max_seq_len) for segment in batch.segments)
        batch = replace(batch, segments=segments, exact=False)
    _ = batch.is_decode_step  # looked at now: the compiler cannot see through what a cached property locks
    return batch


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
