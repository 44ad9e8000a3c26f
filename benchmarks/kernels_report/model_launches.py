"""Every launch of a decode step and of a prefill chunk, by the fused backend at the sizes of real models.

Weights and inputs are zeros that take no memory until they are read, so that 70B's weights fit everywhere. Only the
inputs that determine a kernel's work have real values: positions, rows and the logits to sample from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import PUBLISHED_MODELS
from fastllama.benchmarks.suites.op_cases import LOGITS_STD
from fastllama.distributed.model_parallel import Group
from fastllama.kernels import checking, fused
from fastllama.kernels.attention.prefill import attention_prefill
from fastllama.kernels.batch import RaggedBatch, SamplingTensors
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.embedding import embed
from fastllama.kernels.guesses import MAX_GUESSES
from fastllama.kernels.projection.dequantize import dequantize
from fastllama.kernels.projection.packing import ORDER, FusedWeight
from fastllama.kernels.quantized import BITS, Weight
from fastllama.kernels.rms_norm import rms_norm
from fastllama.kernels.rope import rope_append
from fastllama.kernels.sampling.masks import TokenMasks
from fastllama.kernels.swiglu import silu_mul
from fastllama.model import Transformer
from fastllama.packed_weights import assign
from fastllama.quantization import scheme_of
from fastllama.speculation import MAX_CHECKED_TOKENS, LookupGuesser, window_batch
from fastllama.step_graphs import speculative_step, step

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
CONTEXT_TOKENS = 2048  # of each row in a decode step
BATCHES = (1, 4, 16)
CHECKED_TOKENS = (5, 16)  # of the row, in a step that checks guesses
CHECKED_ROWS = 3  # of the same tokens, where that makes few tokens in all
PREFILL_TOKENS = 64
STEP_POSITIONS = 64  # in a complete step's cache; its launches depend only on the number of rows
PUBLISHED = {"3.2-1B": "llama3.2-1b", "3-8B": "llama3-8b", "3-70B/8": "llama3-70b"}
MODELS = {name: ModelArgs(**PUBLISHED_MODELS[published]) for name, published in PUBLISHED.items()}
MODELS["3-8B+bias"] = replace(MODELS["3-8B"], attention_bias=True, mlp_bias=True)
# Models with quantised weights, and how they are quantised.
QUANTIZED = {f"3-8B {quantize}": quantize for quantize in ("int8", "fp8", "int4")}
MODELS |= dict.fromkeys(QUANTIZED, MODELS["3-8B"])
PROCESSES = {"3-70B/8": 8}  # the number of processes that share a model; 1 for other models
COMMON_MODELS = ("3-8B", "3-70B/8")  # compiled for every GPU

Calls = Iterator[tuple[str, Callable[[], object]]]  # (name of an op, a call of it)


def _lazy_zeros(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Zeros that take no memory until they are read."""
    bytes_of_row = shape[-1] * dtype.itemsize
    return torch.from_numpy(np.zeros((*shape[:-1], bytes_of_row), np.uint8)).view(dtype)


def lazy_weight(name: str, shape: tuple[int, ...], quantize: str | None) -> Weight:
    """A weight of zeros, packed for the fused backend. name: Meta's name of its first part."""
    scheme = scheme_of(quantize, name, shape[-1])
    if scheme is None:
        return torch.nn.Parameter(_lazy_zeros(*shape), requires_grad=False)
    rows, width = shape
    groups = width // scheme.group_size if scheme.group_size else 1
    return FusedWeight(
        scheme.format,
        _lazy_zeros(rows, width * BITS[scheme.format] // 8, dtype=torch.uint8),
        _lazy_zeros(rows, groups, dtype=torch.int32 if scheme.group_size else torch.float32),
        order=ORDER,
        in_features=width,
        scale_dtype=torch.float16 if scheme.group_size else torch.float32,
    )


@dataclass(frozen=True)
class _NoCollectives(Group):
    """Rank 0 without the other ranks: collectives return tensors of the right shape, with wrong values."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape[0], self.size * x.shape[1], dtype=x.dtype)


def _lazy_model(
    args: ModelArgs,
    n_processes: int,
    rows: int,
    positions: int,
    quantize: str | None = None,
    tokens_per_row: int = 1,
) -> Transformer:
    """The first process's part of a model on the fused backend, whose rows have pages for all positions.

    All layers share one layer's weights.
    """
    args = replace(args, max_batch_size=rows, max_seq_len=positions)
    group = _NoCollectives(0, n_processes)
    model = Transformer(args, device=CPU, dtype=DTYPE, backend="reference", init_weights=False, group=group)
    model.ops = fused
    model.allow_step_sizes(tokens_per_row, rows * tokens_per_row)
    model._allocate()  # again, for this backend's workspace
    model.cache.assign([positions] * rows)
    shapes, weights = model.share.shapes, dict[str, Weight]()
    for packed in model.packed_weights():
        if packed.attribute not in weights:
            n_rows = sum(shapes[name][0] for name in packed.names)
            shape = n_rows, *shapes[packed.names[0]][1:]
            weights[packed.attribute] = lazy_weight(packed.names[0], shape, quantize)
        assign(packed.owner, packed.attribute, weights[packed.attribute])
    return model


def decode_ops(args: ModelArgs, rows: int, n_processes: int = 1, quantize: str | None = None) -> Calls:
    """The ops of a decode step of one layer. The names of a layer's ops begin with "layer".

    If several processes share the model, these are one process's ops, without the collectives.
    """
    model = _lazy_model(replace(args, n_layers=1), n_processes, rows, CONTEXT_TOKENS, quantize)
    share, eps, workspace = model.share, args.norm_eps, model.workspace
    layer: Any = model.layers[0]
    cache = model.cache.layer(0)
    batch = RaggedBatch.of([(row, CONTEXT_TOKENS - 1, [1]) for row in range(rows)], CPU, workspace)
    h, f = _lazy_zeros(rows, args.dim), _lazy_zeros(rows, share.hidden_dim)
    q = _lazy_zeros(rows, share.n_heads, share.head_dim)
    a = q.flatten(1)
    begin = None if n_processes == 1 else 0
    yield "embed", lambda: fused.embed(model.tok_embeddings, batch, begin)
    yield (
        "layer qkv",
        lambda: fused.norm_qkv_rope_append(
            h, layer.attention_norm, layer.wqkv, model.rope, cache, eps, batch, layer.bqkv
        ),
    )
    yield "layer attention", lambda: fused.attention(q, cache, batch)
    yield "layer output", lambda: fused.linear_residual(a, layer.wo, h, batch, layer.bo)
    yield "layer gate+up", lambda: fused.norm_swiglu(h, layer.ffn_norm, layer.w13, eps, batch, layer.b13)
    yield "layer down", lambda: fused.linear_residual(f, layer.w2, h, batch, layer.b2)
    yield "head", lambda: fused.norm_lm_head(h, model.norm, model.output, eps, batch)
    state = _state(args, rows, CONTEXT_TOKENS)
    logits = (LOGITS_STD * torch.randn(rows, args.vocab_size, generator=torch.Generator().manual_seed(1))).to(DTYPE)
    yield "sample", lambda: fused.sample_and_advance(logits, state, workspace)
    masks, masked = TokenMasks.of(rows, args.vocab_size, CPU), logits.clone()
    masks.has_mask.fill_(True)
    yield "mask, with grammars", lambda: fused.mask_logits(masked, masks, state.positions)


def whole_step(args: ModelArgs, rows: int, n_processes: int = 1, quantize: str | None = None) -> Callable[[], None]:
    """The decode step of all layers, in one process and without collectives."""
    model = _lazy_model(args, n_processes, rows, STEP_POSITIONS, quantize)
    state = _state(args, rows, STEP_POSITIONS)
    return lambda: step(model, state)


def checking_ops(args: ModelArgs, size: int) -> Calls:
    """The ops of a step that checks guesses of one row, without those that `decode_ops` has for as many rows."""
    model = _lazy_model(replace(args, n_layers=1), 1, 1, CONTEXT_TOKENS, tokens_per_row=size)
    state = _guessing_state(args, CONTEXT_TOKENS)
    window, cache = checking.window(state, 0, size), model.cache.layer(0)
    batch = window_batch(model, window, 1, None)
    q = _lazy_zeros(size, args.n_heads, args.head_dim)
    random = torch.Generator().manual_seed(1)
    logits = (LOGITS_STD * torch.randn(size, args.vocab_size, generator=random)).to(DTYPE)
    drawn, scores = torch.ones(size, dtype=torch.int64), torch.zeros(size)
    yield "window", lambda: fused.window(state, 0, size)
    yield "attention, one row", lambda: fused.attention(q, cache, batch)
    if CHECKED_ROWS * size <= MAX_CHECKED_TOKENS:
        yield f"attention, {CHECKED_ROWS} rows", _attention_of_rows(args, size)
    yield "sample, one row", lambda: fused.sample(logits, state.sampling, window.following, model.workspace)
    yield "accept", lambda: fused.accept(state, drawn, scores)
    yield "look_up", lambda: fused.look_up(state, MAX_GUESSES)
    yield "put_guess", lambda: fused.put_guess(state, 0, drawn)


def _attention_of_rows(args: ModelArgs, size: int) -> Callable[[], object]:
    """The attention of a step that checks guesses of CHECKED_ROWS rows."""
    model = _lazy_model(replace(args, n_layers=1), 1, CHECKED_ROWS, CONTEXT_TOKENS, tokens_per_row=size)
    rows = [(row, CONTEXT_TOKENS - size, [1] * size) for row in range(CHECKED_ROWS)]
    batch = replace(RaggedBatch.of(rows, CPU, model.workspace), tokens_per_row=size)
    q, cache = _lazy_zeros(CHECKED_ROWS * size, args.n_heads, args.head_dim), model.cache.layer(0)
    return lambda: fused.attention(q, cache, batch)


def checked_step(args: ModelArgs, size: int) -> Callable[[], None]:
    """The step of all layers that checks size - 1 looked-up guesses of one row."""
    model = _lazy_model(args, 1, 1, STEP_POSITIONS, tokens_per_row=size)
    state, guesser = _guessing_state(args, STEP_POSITIONS), LookupGuesser(model)
    return lambda: speculative_step(model, state, guesser, size - 1)


def _guessing_state(args: ModelArgs, positions: int) -> DecodeState:
    """One row with room for guesses after its newest token."""
    state = DecodeState.of(1, positions, args.vocab_size, CPU).with_guesses(positions)
    newest = positions - MAX_GUESSES - 2
    state.set([1], [newest], [positions - 1], [2, 3], SamplingTensors.of(0.6, 0.9, [(1, 0, 0)], CPU))
    guesses = state.guesses
    assert guesses is not None
    guesses.tokens.fill_(1)
    return state


def _state(args: ModelArgs, rows: int, positions: int) -> DecodeState:
    """Rows that sample, at the second-to-last of this many positions."""
    state = DecodeState.of(rows, positions, args.vocab_size, CPU)
    sampling = SamplingTensors.of(0.6, 0.9, [(1, row, 0) for row in range(rows)], CPU)
    state.set([1] * rows, [positions - 2] * rows, [positions - 1] * rows, [2, 3], sampling)
    return state


def prefill_ops(args: ModelArgs, n_processes: int = 1, quantize: str | None = None) -> Calls:
    """The kernels around the library's matmuls, for a chunk of a prompt at the end of a cached context.

    With quantised weights only the one that others do not launch.
    """
    model = _lazy_model(replace(args, n_layers=1), n_processes, 1, CONTEXT_TOKENS, quantize)
    if quantize is not None:
        weight: Any = model.layers[0].w2
        yield "dequantize", lambda: dequantize(weight, _lazy_zeros(*weight.shape))
        return
    share, tokens = model.share, PREFILL_TOKENS
    cache = model.cache.layer(0)
    batch = RaggedBatch.of([(0, CONTEXT_TOKENS - tokens, [1] * tokens)], CPU)
    h, gate_up = _lazy_zeros(tokens, args.dim), _lazy_zeros(tokens, 2 * share.hidden_dim)
    q = _lazy_zeros(tokens, share.n_heads, share.head_dim)
    qkv = _lazy_zeros(tokens, (share.n_heads + 2 * share.n_kv_heads) * share.head_dim)
    yield "embed", lambda: embed(model.tok_embeddings, batch.tokens)
    yield "norm", lambda: rms_norm(h, model.norm, args.norm_eps)
    yield "rotary, append", lambda: rope_append(qkv, model.rope, cache, batch)
    yield "attention", lambda: attention_prefill(q, cache, batch)
    yield "swiglu", lambda: silu_mul(gate_up)
