"""The `native` backend: the ops of `reference` as C++ kernels for CPUs. `reference` documents shapes and meaning.

The number of tokens decides how an op runs. For few tokens, and in a captured decode step, every op is one or two calls
of a kernel: a projection has its norm at the start and its epilogue at the end. More tokens use oneDNN's matrix product
and the reference's other ops; how many depends on the dtype (`max_tokens`). Kernels do not run between these, because
after each of its ops the library's threads keep their CPUs busy for milliseconds. Quantised weights are the exception:
their kernels take more tokens than attention's, and beyond, they dequantise weights for the library.

The kernels widen weights in registers, sum in float32 and round where the reference rounds. Results do not depend on
the number of threads. Weights are row-major, so a single weight and its packed form are the same bytes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.batch import RaggedBatch, SamplingTensors, Workspace
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.graph import Graph
from fastllama.kernels.native import arguments, checking, many_tokens, memory, weights
from fastllama.kernels.native.graph import NativeGraph
from fastllama.kernels.native.library import (
    Epilogue,
    Kind,
    empty,
    multiplies_bfloat16,
    recording,
    run,
)
from fastllama.kernels.paged_cache import LayerCache
from fastllama.kernels.quantized import QuantizedWeight, Weight
from fastllama.kernels.sampling import masks

MAX_FLOAT32_TOKENS = 128  # of a projection by the kernels; more are faster by the library's matrix product
MAX_BFLOAT16_TOKENS = 32  # the same, where the CPU multiplies bfloat16; without, the library is never faster
# The same for a quantised weight, which must be dequantised for the library. In float32 the kernels are as fast as the
# library at any number of tokens.
MAX_QUANTIZED_BFLOAT16_TOKENS = 128
MAX_TOKENS_PER_OP = 256  # of a LINEAR op, which keeps the inputs of all its tokens; more are several ops
# Attention splits a row at every SPLIT_KEYS keys, and deals the splits to at most MAX_SPLIT_GROUPS groups. For up to
# MAX_MERGED_ROWS rows, every group is a chunk of work of its own.
SPLIT_KEYS = 512
MAX_SPLIT_GROUPS = 16
MAX_MERGED_ROWS = 16
PER_TOKEN = ("residual", "positions", "rows")  # fields of a LINEAR op with a value per token, beside x and out
STATISTICS_LOGITS = 4096  # logits of a row in one chunk of sampling's statistics


def embed(table: Tensor, batch: RaggedBatch, begin: int | None = None) -> Tensor:
    """(V, E) -> (N, E)."""
    arguments.check_embed(table, batch)
    (n_tokens,), (vocab, width) = batch.tokens.shape, table.shape
    h = empty((n_tokens, width), table.dtype)
    sizes = {"n_tokens": n_tokens, "width": width, "vocab": vocab, "begin": -1 if begin is None else begin}
    run(Kind.EMBED, table.dtype, tokens=batch.tokens, x=table, out=h, **sizes)
    return h


def norm_qkv_rope_append(
    h: Tensor,
    norm: Tensor,
    weight: Weight,
    rope: Tensor,
    cache: LayerCache,
    eps: float,
    batch: RaggedBatch,
    bias: Tensor | None = None,
) -> Tensor:
    """h (N, E) -> q (N, H, D); appends keys and values to the cache."""
    if _uses_library(h, weight):
        heads = many_tokens.linear(reference.rms_norm(h, norm, eps), weight, bias)
        return reference.rope_append(heads, rope, cache, batch)
    arguments.check_projection(h, weight, norm, bias=bias)
    n_heads = arguments.check_heads(h, weight.shape[0], rope, cache, batch)
    q = empty((h.shape[0], n_heads, cache.k.shape[3]), h.dtype)
    fields = {"norm": norm, "eps": eps, "bias": bias, "rope": rope, "n_heads": n_heads, **_cache_fields(cache, batch)}
    _linear(h, weight, Epilogue.ROTATE_AND_APPEND, q, weight.shape[0], **fields)
    return q


def attention(q: Tensor, cache: LayerCache, batch: RaggedBatch) -> Tensor:
    """q (N, H, D) -> (N, H·D)."""
    if _uses_library(q):
        return reference.attention(q, cache, batch)
    n_rows = arguments.check_attention(q, cache, batch)
    n_tokens, n_heads, head_dim = q.shape
    groups = min(-(-cache.length // SPLIT_KEYS), MAX_SPLIT_GROUPS)
    out = empty((n_tokens, n_heads * head_dim), q.dtype)
    is_merged = groups > 1 and n_rows <= MAX_MERGED_ROWS
    partial = empty((n_tokens, n_heads, groups, head_dim + 2), torch.float32) if is_merged else None
    fields: dict[str, Tensor | int | None] = {
        **{"x": q, "out": out, "partial": partial, "n_tokens": n_tokens, "n_heads": n_heads},
        **{"split": SPLIT_KEYS, "groups": groups, "tokens_per_row": batch.tokens_per_row},
        **_cache_fields(cache, batch),
    }
    run(Kind.ATTENTION, q.dtype, **fields)
    if is_merged:
        run(Kind.ATTENTION_MERGE, q.dtype, **fields)
    return out


def linear_residual(
    x: Tensor, weight: Weight, residual: Tensor | None, batch: RaggedBatch, bias: Tensor | None = None
) -> Tensor:
    """x (N, ·) -> (N, E)."""
    if _uses_library(x, weight):
        y = many_tokens.linear(x, weight, bias)
        return y if residual is None else y.add_(residual)
    arguments.check_projection(x, weight, bias=bias, residual=residual)
    y = empty((x.shape[0], weight.shape[0]), x.dtype)
    epilogue = Epilogue.STORE if residual is None else Epilogue.ADD_RESIDUAL
    _linear(x, weight, epilogue, y, weight.shape[0], bias=bias, residual=residual)
    return y


def norm_swiglu(
    h: Tensor, norm: Tensor, weight: Weight, eps: float, batch: RaggedBatch, bias: Tensor | None = None
) -> Tensor:
    """h (N, E) -> (N, F)."""
    if _uses_library(h, weight):
        return reference.silu_mul(many_tokens.linear(reference.rms_norm(h, norm, eps), weight, bias))
    arguments.check_projection(h, weight, norm, bias=bias)
    width = arguments.half(weight.shape[0])
    f = empty((h.shape[0], width), h.dtype)
    _linear(h, weight, Epilogue.SWIGLU, f, width, norm=norm, eps=eps, bias=bias)
    return f


def norm_lm_head(h: Tensor, norm: Tensor, weight: Weight, eps: float, batch: RaggedBatch) -> Tensor:
    """h (M, E) -> logits (M, V)."""
    if _uses_library(h, weight):
        return many_tokens.linear(reference.rms_norm(h, norm, eps), weight)
    arguments.check_projection(h, weight, norm)
    logits = empty((h.shape[0], weight.shape[0]), h.dtype)
    _linear(h, weight, Epilogue.STORE, logits, weight.shape[0], norm=norm, eps=eps)
    return logits


def sample(
    logits: Tensor, sampling: SamplingTensors, positions: Tensor, workspace: Workspace | None = None
) -> tuple[Tensor, Tensor]:
    """logits (B·S, V) -> tokens (B·S,) int64 and their log-probabilities (B·S,) float32, S draws a row of sampling."""
    draws = arguments.check_sampling(logits, sampling, positions)
    shape = positions.shape
    tokens, logprobs = empty(shape, torch.int64), empty(shape, torch.float32)
    _sample(logits, sampling, positions=positions, out=tokens, logprobs=logprobs, tokens_per_row=draws)
    return tokens, logprobs


def sample_and_advance(logits: Tensor, state: DecodeState, workspace: Workspace | None = None) -> None:
    """logits (B, V) -> each row advances to its next token."""
    if arguments.check_sampling(logits, state.sampling, state.positions) != 1:
        raise ValueError(f"sampling must have {logits.shape[0]} rows, as the logits, got {len(state.sampling.seed)}")
    arguments.check_state(logits, state)
    _sample(
        logits,
        state.sampling,
        has_state=1,
        tokens_per_row=1,
        state_tokens=state.tokens,
        state_positions=state.positions,
        starts=state.starts,
        last=state.last,
        is_stop=state.is_stop,
        out_tokens=state.out_tokens,
        out_logprobs=state.out_logprobs,
        n_steps=state.out_tokens.shape[0],
        out_stride=state.out_tokens.stride(0),
    )


# For rows with a grammar, and for a step that checks guesses.
mask_logits = masks.mask_logits_of_rows
window, accept, look_up, put_guess = checking.window, checking.accept, checking.look_up, checking.put_guess


def max_tokens(dtype: torch.dtype, *, quantized: bool = False) -> float:
    """The most tokens for which the kernels are faster than the library's matrix product."""
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return MAX_QUANTIZED_BFLOAT16_TOKENS if quantized else MAX_BFLOAT16_TOKENS
    return MAX_FLOAT32_TOKENS if dtype == torch.float32 and not quantized else math.inf


def _uses_library(x: Tensor, weight: Weight | None = None) -> bool:
    """Whether these inputs (N, ·) are too many for the kernels. A captured step has kernels only."""
    if recording.ops is not None:
        return False
    return x.shape[0] > max_tokens(x.dtype, quantized=isinstance(weight, QuantizedWeight))


def _cache_fields(cache: LayerCache, batch: RaggedBatch) -> dict[str, Tensor | int]:
    """The fields of an op that describe a layer's cache, and the tokens' places in it."""
    n_pages, n_kv_heads, _, head_dim = cache.k.shape
    return {
        **{"cache_k": cache.k, "cache_v": cache.v, "pages": cache.table, "n_pages": n_pages},
        **{"n_kv_heads": n_kv_heads, "head_dim": head_dim, "length": cache.length, "cache_rows": cache.table.shape[0]},
        **{"positions": batch.positions, "rows": batch.rows},
    }


def _linear(
    x: Tensor, weight: Weight, epilogue: Epilogue, out: Tensor, outputs: int, **fields: Tensor | int | float | None
) -> None:
    """A projection, of at most MAX_TOKENS_PER_OP tokens at a time."""
    n_tokens, width = x.shape
    for begin in range(0, n_tokens, MAX_TOKENS_PER_OP):
        part = slice(begin, min(begin + MAX_TOKENS_PER_OP, n_tokens))
        of_part = {name: value[part] for name in PER_TOKEN if isinstance(value := fields.get(name), Tensor)}
        sizes = {"n_tokens": part.stop - begin, "width": width, "outputs": outputs, "epilogue": epilogue}
        run(
            Kind.LINEAR,
            x.dtype,
            x=x[part],
            out=out[part],
            **sizes,
            **weights.fields_of(weight),
            **{**fields, **of_part},
        )


def _sample(logits: Tensor, sampling: SamplingTensors, **fields: Tensor | int) -> None:
    n_rows, vocab = logits.shape
    groups = -(-vocab // STATISTICS_LOGITS)
    partial = empty((n_rows, groups, 4), torch.float32)
    sizes = {"n_tokens": n_rows, "vocab": vocab, "split": STATISTICS_LOGITS, "groups": groups}
    run(Kind.STATISTICS, logits.dtype, x=logits, partial=partial, **sizes)
    parameters = {name: getattr(sampling, name) for name in ("temperature", "top_p", "seed", "stream", "call")}
    run(Kind.SAMPLE, logits.dtype, x=logits, partial=partial, **sizes, **parameters, **fields)


# Weight layouts and machines.


pack, unpack = weights.pack, reference.unpack
allocate = memory.allocate
rms_norm, rope_append, silu_mul = reference.rms_norm, reference.rope_append, reference.silu_mul


def workspace(
    *,
    max_batch_size: int,
    max_tokens_per_row: int = 1,
    max_tokens: int | None = None,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    vocab_size: int,
    device: torch.device,
) -> Workspace:
    """The scratch memory that the ops of a step share: each thread of the kernels has its own."""
    return Workspace()


def supports_cuda_graphs(device: torch.device) -> bool:
    """False: the kernels run on a CPU."""
    return False


def graph_factory(device: torch.device) -> Callable[[], Graph] | None:
    """Graphs of native ops."""
    return NativeGraph


def uses_dependent_launch() -> bool:
    """False: the kernels run on a CPU."""
    return False
