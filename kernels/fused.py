"""The `fused` backend: the ops of `reference` as Triton kernels. `reference` documents shapes and meaning of each op.

The number of tokens decides which kernels an op launches. A decode layer is five launches:

    tokens     norm_qkv_rope_append        attention          linear_residual, norm_swiglu, norm_lm_head
    1          matvec with epilogue        attention_decode   matvec with epilogue
    2 to 16    few_tokens with epilogue    attention_decode   few_tokens with epilogue
    more       rms_norm, library matmul,   attention_prefill  rms_norm, library matmul, epilogue kernel
               rope_append

A prompt's tokens use `attention_prefill` for any number of tokens, a decode step uses `attention_decode`. A decode step
is 5·L + 4 launches: one `embed`, L layers, `norm_lm_head` and the two launches of `sample_and_advance`.

Weights are row-major, so a single weight and its packed form are the same bytes. Quantised weights have
kernels of their own for up to 16 tokens, in as many launches; for more they are dequantised for the library's matmul
(`projection/dequantize.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from fastllama.kernels import checking_triton, rope
from fastllama.kernels import rms_norm as norms
from fastllama.kernels import swiglu as activation
from fastllama.kernels.attention.decode import attention_decode
from fastllama.kernels.attention.prefill import attention_prefill
from fastllama.kernels.attention.scratch import AttentionScratch
from fastllama.kernels.batch import RaggedBatch, SamplingTensors, Workspace
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.embedding import embed as gather
from fastllama.kernels.graph import Graph
from fastllama.kernels.guesses import Window
from fastllama.kernels.launch import interpreter
from fastllama.kernels.launch.checks import check_head_dim
from fastllama.kernels.launch.dependent import is_dependent
from fastllama.kernels.paged_cache import LayerCache
from fastllama.kernels.projection import quantized_matvec
from fastllama.kernels.projection.dequantize import linear
from fastllama.kernels.projection.few_tokens import MAX_TOKENS, few_tokens
from fastllama.kernels.projection.matvec import choose_launch, matvec
from fastllama.kernels.projection.packing import checked, pack_quantized, unpack_quantized
from fastllama.kernels.projection.quantized_few_tokens import quantized_few_tokens
from fastllama.kernels.quantized import QuantizedWeight, Weight
from fastllama.kernels.rope import CacheTarget
from fastllama.kernels.sampling import mask_logits as masking
from fastllama.kernels.sampling import sample as sampler
from fastllama.kernels.sampling.scratch import SamplingScratch

P = ParamSpec("P")
R = TypeVar("R")
Kernel = Callable[..., Tensor]

if interpreter.interpreting():
    interpreter.patch()


@dataclass(frozen=True)
class FusedWorkspace(Workspace):
    """Scratch memory of the kernels. Only one step at a time may use it."""

    attention: AttentionScratch
    sampling: SamplingScratch

    def reset(self) -> None:
        """Zero the counters."""
        self.attention.reset()
        self.sampling.reset()


def supports_cuda_graphs(device: torch.device) -> bool:
    """True on a GPU: kernels read the rows' lengths on the device."""
    return device.type == "cuda"


def graph_factory(device: torch.device) -> Callable[[], Graph] | None:
    """None: its graphs are CUDA's."""
    return None


def uses_dependent_launch() -> bool:
    """True from compute capability 9.0 on, unless the launch options turn it off."""
    return is_dependent()


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
    """Scratch memory for a model. Raises ValueError for a head dim or vocabulary that the kernels do not support."""
    check_head_dim(head_dim)
    most = max_batch_size * max_tokens_per_row if max_tokens is None else max_tokens
    return FusedWorkspace(
        AttentionScratch.of(
            max_batch_size,
            n_kv_heads,
            n_heads,
            head_dim,
            device,
            max_tokens_per_row=max_tokens_per_row,
            max_tokens=most,
        ),
        SamplingScratch.of(max(max_batch_size, most), vocab_size, device),
    )


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory for a weight or a cache."""
    return torch.empty(shape, dtype=dtype, device=device)


def pack(*parts: Weight) -> Weight:
    """Concatenate weights (rows_i, E) that are applied to the same input -> (sum of rows, E).

    Tensors stay row-major. Quantised weights must have the same format, groups and kinds of scales and offsets, and are
    put in the order of the kernels' loads.
    """
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        return pack_quantized(cast(Sequence[QuantizedWeight], parts))
    return tensors[0].contiguous() if len(parts) == 1 else torch.cat(tensors)


def unpack(weight: Weight, rows: Sequence[int]) -> tuple[Weight, ...]:
    """Split a packed weight into its parts, of the given numbers of rows, in plain order."""
    if isinstance(weight, QuantizedWeight):
        return unpack_quantized(weight, rows)
    return torch.split(weight, list(rows))


def _on_tensor_device(op: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run the op with its tensors' GPU as the current device, on which Triton launches."""

    @wraps(op)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return op(*args, **kwargs)
        with torch.cuda.device(device):
            return op(*args, **kwargs)

    return guarded


# Parts of the ops below, for callers that need one alone.
rms_norm = _on_tensor_device(norms.rms_norm)
rope_append = _on_tensor_device(rope.rope_append)
silu_mul = _on_tensor_device(activation.silu_mul)


@_on_tensor_device
def embed(table: Tensor, batch: RaggedBatch, begin: int | None = None) -> Tensor:
    """(V, E) -> (N, E)."""
    return gather(table, batch.tokens, begin)


@_on_tensor_device
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
    if h.shape[0] > MAX_TOKENS:
        return rope_append(linear(rms_norm(h, norm, eps), weight, bias), rope, cache, batch)
    target = CacheTarget.of(cache, rope, batch)
    q = _project(h, weight, bias=bias, norm=norm, eps=eps, append_to=target)
    return q.view(h.shape[0], -1, cache.k.shape[3])


@_on_tensor_device
def attention(q: Tensor, cache: LayerCache, batch: RaggedBatch) -> Tensor:
    """q (N, H, D) -> (N, H·D)."""
    if not batch.is_decode_step:
        return attention_prefill(q, cache, batch)
    size = batch.tokens_per_row
    if isinstance(batch.workspace, FusedWorkspace):
        scratch = batch.workspace.attention
    else:
        heads = cache.k.shape[1], q.shape[1], q.shape[2]
        scratch = AttentionScratch.of(q.shape[0] // size, *heads, q.device, max_tokens_per_row=size)
    return attention_decode(q, cache, batch.positions, scratch, tokens_per_row=size)


@_on_tensor_device
def linear_residual(
    x: Tensor, weight: Weight, residual: Tensor | None, batch: RaggedBatch, bias: Tensor | None = None
) -> Tensor:
    """x (N, ·) -> (N, E)."""
    if x.shape[0] > MAX_TOKENS:
        y = linear(x, weight, bias)
        return y if residual is None else y.add_(residual)
    return _project(x, weight, bias=bias, residual=residual)


@_on_tensor_device
def norm_swiglu(
    h: Tensor, norm: Tensor, weight: Weight, eps: float, batch: RaggedBatch, bias: Tensor | None = None
) -> Tensor:
    """h (N, E) -> (N, F)."""
    if h.shape[0] > MAX_TOKENS:
        return silu_mul(linear(rms_norm(h, norm, eps), weight, bias))
    return _project(h, weight, bias=bias, norm=norm, eps=eps, swiglu=True)


@_on_tensor_device
def norm_lm_head(h: Tensor, norm: Tensor, weight: Weight, eps: float, batch: RaggedBatch) -> Tensor:
    """h (M, E) -> logits (M, V)."""
    if h.shape[0] > MAX_TOKENS:
        return linear(rms_norm(h, norm, eps), weight)
    return _project(h, weight, norm=norm, eps=eps)


@_on_tensor_device
def sample(
    logits: Tensor, sampling: SamplingTensors, positions: Tensor, workspace: Workspace | None = None
) -> tuple[Tensor, Tensor]:
    """logits (B·S, V) -> tokens (B·S,) int64 and their log-probabilities (B·S,) float32, in two launches."""
    return sampler.sample(logits, sampling, positions, _sampling_scratch(logits, workspace))


@_on_tensor_device
def sample_and_advance(logits: Tensor, state: DecodeState, workspace: Workspace | None = None) -> None:
    """logits (B, V) -> each row advances to its next token, in the same two launches."""
    sampler.sample_and_advance(logits, state, _sampling_scratch(logits, workspace))


mask_logits = _on_tensor_device(masking.mask_logits)  # of rows with a grammar, in one launch


def window(state: DecodeState, begin: int, end: int) -> Window:
    """The tokens from p + begin to p + end - 1 of every row, in one launch."""
    with torch.cuda.device(_index_of(state)):
        return checking_triton.window(state, begin, end)


def accept(state: DecodeState, drawn: Tensor, logprobs: Tensor) -> None:
    """drawn, logprobs (B·S,) -> each row advances up to its first draw that was not guessed, in one launch."""
    with torch.cuda.device(_index_of(state)):
        checking_triton.accept(state, drawn, logprobs)


def look_up(state: DecodeState, n_guesses: int) -> None:
    """The first n_guesses guesses of every row, from its own tokens, in one launch."""
    with torch.cuda.device(_index_of(state)):
        checking_triton.look_up(state, n_guesses)


def put_guess(state: DecodeState, number: int, drawn: Tensor) -> None:
    """drawn (B·S,) of a draft model -> each row's guess of this number, in one launch."""
    with torch.cuda.device(_index_of(state)):
        checking_triton.put_guess(state, number, drawn)


def _index_of(state: DecodeState) -> int:
    """The state's GPU, on which Triton launches; -1 for a CPU."""
    return -1 if state.rows.device.index is None else state.rows.device.index


def _sampling_scratch(logits: Tensor, workspace: Workspace | None) -> SamplingScratch:
    if isinstance(workspace, FusedWorkspace) and workspace.sampling.counters.shape[0] >= logits.shape[0]:
        return workspace.sampling
    return SamplingScratch.of(logits.shape[0], logits.shape[1], logits.device)


def _project(
    x: Tensor,
    weight: Weight,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    swiglu: bool = False,
    append_to: CacheTarget | None = None,
) -> Tensor:
    """A projection of 1 to 16 tokens, in one launch."""
    tiles = 1 if append_to is None and not swiglu else 2
    if isinstance(weight, QuantizedWeight):
        one = x.shape[0] == 1 and quantized_matvec.is_best(checked(weight), tiles, x.dtype)
        kernel = cast(Kernel, quantized_matvec.quantized_matvec if one else quantized_few_tokens)
    else:
        kernel = cast(Kernel, matvec if x.shape[0] == 1 and choose_launch(weight, tiles) is not None else few_tokens)
    return kernel(x, weight, bias=bias, norm=norm, eps=eps, residual=residual, swiglu=swiglu, append_to=append_to)
