"""Every launch of a decode step and of a prefill chunk, made through the fused backend at the sizes of real models.

The tensors are memory that was never touched, except what kernels decide by: tokens, positions, rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.decode_graph import step
from fastllama.distributed.parallel import SINGLE_PROCESS, Group
from fastllama.kernels import fused
from fastllama.kernels.attention.prefill import attention_prefill
from fastllama.kernels.batch import RaggedBatch, SamplingTensors, Workspace
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.elementwise.embedding import embed
from fastllama.kernels.elementwise.rms_norm import rms_norm
from fastllama.kernels.elementwise.rope import rope_append
from fastllama.kernels.elementwise.swiglu import silu_mul
from fastllama.model import Transformer
from fastllama.packed_weights import packed_weights

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
EPS = 1e-5
MAX_SEQ_LEN = 8192
CONTEXT_TOKENS = 2048  # of each row in a decode step
BATCHES = (1, 4, 16)
PREFILL_TOKENS = 64
STEP_POSITIONS = 64
DIVIDED = ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size")  # among processes that share a model


class Shape(NamedTuple):
    """A model's widths, or one rank's part of them."""

    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    n_processes: int = 1  # of which each has as much

    @property
    def whole(self) -> dict[str, Any]:
        """The whole model's widths, ModelArgs' fields."""
        divided = {name: self.n_processes * getattr(self, name) for name in DIVIDED}
        return {name: value for name, value in self._asdict().items() if name != "n_processes"} | divided


MODELS = {
    "3.2-1B": Shape(16, 2048, 32, 8, 64, 8192, 128256),
    "3-8B": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    # One of eight ranks: an eighth of the heads, of the ffn width and of the vocabulary.
    "3-70B/8": Shape(80, 8192, 8, 1, 128, 3584, 16032, n_processes=8),
}
OTHERS_MODELS = ("3-8B", "3-70B/8")  # compiled for GPUs that are not an H200: the smallest asks least of them


def _untouched(*shape: int) -> Tensor:
    """Zeros that take no memory until they are read."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(DTYPE)


class _Layer:
    """A layer's tensors, those around the layers, and a cache of rows."""

    def __init__(self, shape: Shape, rows: int) -> None:
        self.shape = shape
        qkv_rows = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
        self.norm = _untouched(shape.dim)  # each of them
        self.tok_embeddings, self.output = (_untouched(shape.vocab_size, shape.dim) for _ in range(2))
        self.wqkv, self.wo = _untouched(qkv_rows, shape.dim), _untouched(shape.dim, shape.n_heads * shape.head_dim)
        self.w13, self.w2 = _untouched(2 * shape.hidden_dim, shape.dim), _untouched(shape.dim, shape.hidden_dim)
        self.rope = torch.empty(MAX_SEQ_LEN, shape.head_dim // 2, 2)
        cache = (rows, shape.n_kv_heads, MAX_SEQ_LEN, shape.head_dim)
        self.cache_k, self.cache_v = _untouched(*cache), _untouched(*cache)


def decode_ops(shape: Shape, rows: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The ops of a decode step of one layer behind another, each to be called before the next is taken.

    Yields (name, call); a layer's names begin with "layer". Of a model that processes share, one's: collectives are
    none of these.
    """
    layer = _Layer(shape, rows)
    workspace = _workspace(shape, rows)
    batch = RaggedBatch.of([(row, CONTEXT_TOKENS - 1, [1]) for row in range(rows)], CPU, workspace)
    made: dict[str, Tensor] = {}

    def keep(name: str, call: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: made.__setitem__(name, call())

    table, output = layer.tok_embeddings, layer.output
    caches = layer.rope, layer.cache_k, layer.cache_v
    begin = None if shape.n_processes == 1 else 0
    yield "embed", keep("h", lambda: fused.embed(table, batch, begin))
    yield (
        "layer qkv",
        keep("q", lambda: fused.norm_qkv_rope_append(made["h"], layer.norm, layer.wqkv, *caches, EPS, batch)),
    )
    yield "layer attention", keep("a", lambda: fused.attention(made["q"], layer.cache_k, layer.cache_v, batch))
    yield "layer output", keep("h", lambda: fused.linear_residual(made["a"], layer.wo, made["h"], batch))
    yield "layer gate+up", keep("f", lambda: fused.norm_swiglu(made["h"], layer.norm, layer.w13, EPS, batch))
    yield "layer down", keep("h", lambda: fused.linear_residual(made["f"], layer.w2, made["h"], batch))
    yield "head", keep("logits", lambda: fused.norm_lm_head(made["h"], layer.norm, output, EPS, batch))
    state = _state(shape, rows, CONTEXT_TOKENS)
    # Spread as a model's are, so that the nucleus is small.
    logits = (3 * torch.randn(rows, shape.whole["vocab_size"], generator=torch.Generator().manual_seed(1))).to(DTYPE)
    yield "sample", lambda: fused.sample_and_advance(logits, state, workspace)


@dataclass(frozen=True)
class _Unheard(Group):
    """One of several processes, whose collectives nobody hears: for its launches, not for answers."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape[0], self.size * x.shape[1], dtype=x.dtype)


def whole_step(shape: Shape, rows: int) -> Callable[[], None]:
    """The decode step itself, of a Transformer of all the model's layers; of one process, without collectives."""
    # Its cache is short: what is launched depends on the number of rows alone.
    args = ModelArgs(**shape.whole, max_batch_size=rows, max_seq_len=STEP_POSITIONS)
    group = _Unheard(0, shape.n_processes) if shape.n_processes > 1 else SINGLE_PROCESS
    model = Transformer(args, device=CPU, dtype=DTYPE, backend="reference", init_weights=False, group=group)
    model.ops, model.workspace = fused, _workspace(shape, rows)
    layer = _Layer(shape, rows)
    for slot in packed_weights(model, model.layers):
        weight = getattr(layer, slot.attribute, layer.norm)
        setattr(slot.owner, slot.attribute, torch.nn.Parameter(weight, requires_grad=False))
    state = _state(shape, rows, STEP_POSITIONS)
    return lambda: step(model, state)


def _workspace(shape: Shape, rows: int) -> Workspace:
    return fused.workspace(
        max_batch_size=rows,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.whole["vocab_size"],
        device=CPU,
    )


def _state(shape: Shape, rows: int, positions: int) -> DecodeState:
    """Rows that draw, and stand before the last of so many positions."""
    state = DecodeState.of(rows, positions, shape.whole["vocab_size"], CPU)
    sampling = SamplingTensors.of(0.6, 0.9, [(1, row, 0) for row in range(rows)], CPU)
    state.set([1] * rows, [positions - 2] * rows, [positions - 1] * rows, [2, 3], sampling)
    return state


def prefill_ops(shape: Shape) -> Iterator[tuple[str, Callable[[], object]]]:
    """The kernels around the library's matmul, for a chunk of a prompt behind what is cached already."""
    layer = _Layer(shape, 1)
    tokens = PREFILL_TOKENS
    batch = RaggedBatch.of([(0, CONTEXT_TOKENS - tokens, [1] * tokens)], CPU)
    h = _untouched(tokens, shape.dim)
    heads = _untouched(tokens, layer.wqkv.shape[0])
    q = _untouched(tokens, shape.n_heads, shape.head_dim)
    yield "embed", lambda: embed(layer.tok_embeddings, batch.tokens)
    yield "norm", lambda: rms_norm(h, layer.norm, EPS)
    yield "rotary, append", lambda: rope_append(heads, layer.rope, layer.cache_k, layer.cache_v, batch)
    yield "attention", lambda: attention_prefill(q, layer.cache_k, layer.cache_v, batch)
    yield "swiglu", lambda: silu_mul(_untouched(tokens, 2 * shape.hidden_dim))
