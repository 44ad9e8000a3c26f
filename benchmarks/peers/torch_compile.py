"""Our reference backend with torch.compile as a peer: the layers, the head and the sampling are compiled.

Weights are row-major, the only layout that the compiler knows. A decode step reads the complete cache under a mask, so
all lengths share one program. Everything around the model is ours. It runs without CUDA graphs: torch.compile's own do
not accept the cache, which is written in place.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.peers.worker import Generate, compile_or_fail, margins_of
from fastllama.benchmarks.runners import Ours, Run
from fastllama.kernels import reference
from fastllama.kernels.batch import RaggedBatch, Workspace
from fastllama.kernels.decode_state import DecodeState
from fastllama.model import Transformer

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
# The functions that a model uses of its backend, except sample_and_advance.
OPS = (
    *("embed", "norm_qkv_rope_append", "attention", "linear_residual", "norm_swiglu", "norm_lm_head"),
    *("supports_cuda_graphs", "graph_factory", "pack", "unpack", "workspace"),
)


def build(spec: ModelSpec, request: dict[str, Any]) -> Generate:
    """The model of `spec`, compiled."""
    llm = replace(spec, backend="reference").build()
    compile_or_fail()
    return partial(generate, Ours(llm), compile_model(llm.model, partial(torch.compile, fullgraph=True)))


class _Ops(SimpleNamespace):
    """The reference's ops, with a compiled sample_and_advance that can keep the margins of its logits."""

    def __init__(self, compiled: Compiler) -> None:
        super().__init__(**{name: getattr(reference, name) for name in OPS})
        self.margins: list[list[float]] | None = None  # one list for each step; None if they were not requested
        self._sample_and_advance = compiled(reference.sample_and_advance)

    def sample_and_advance(self, logits: Tensor, state: DecodeState, workspace: Workspace | None = None) -> None:
        if self.margins is not None:
            self.margins.append(margins_of(logits))
        self._sample_and_advance(logits, state, workspace)


def compile_model(model: Transformer, compiled: Compiler) -> _Ops:
    """Compile the model's layers, head and sampling with `compiled`. Returns the model's new ops."""
    ops = _Ops(compiled)
    model.ops = cast(Any, ops)
    hidden, max_seq_len = compiled(model.hidden), model.cache.max_seq_len
    model.hidden = lambda batch: hidden(_with_complete_cache(batch, max_seq_len))  # type: ignore[method-assign]
    model.logits = compiled(model.logits)  # type: ignore[method-assign]
    return ops


def _with_complete_cache(batch: RaggedBatch, max_seq_len: int) -> RaggedBatch:
    """A decode step over the complete cache under a mask: the compiler makes one program instead of one per length."""
    if batch.is_decode_step:
        segments = tuple(segment._replace(keys=max_seq_len) for segment in batch.segments)
        batch = replace(batch, segments=segments, exact=False)
    _ = batch.is_decode_step  # cached here: the compiler cannot trace the lock of a cached property
    return batch


def generate(ours: Ours, ops: _Ops, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run:
    """`steps` greedy tokens for each prompt."""
    ops.margins = [] if with_logprobs else None
    found = ours.run(prompts, steps, with_logprobs)
    if ops.margins is None:
        return found
    # Steps that were queued after the last one have margins too.
    return replace(found, margins=[list(row) for row in zip(*ops.margins[:steps], strict=True)])
