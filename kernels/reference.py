"""The `reference` backend: the model's mathematics in plain torch, on any device.

Every Triton kernel is tested against this file. A forward pass is

    embed
    L times: norm_qkv_rope_append, attention, linear_residual, norm_swiglu, linear_residual
    norm_lm_head
    sample, or sample_and_advance in a decode step

and the functions below have that order. Functions for weight layouts and machines come last.

Dims, here and in every shape below:

    B rows · N tokens in this call · T cache positions · E model width · H query heads · K kv heads · G = H / K
    D head dim · F ffn width · V vocabulary · L layers · P pages of the cache

Results are rounded to the model dtype where Meta's code rounds. Attention scores and softmax stay in float32.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels import checking
from fastllama.kernels.batch import MAX_TEMPERATURE, MIN_TEMPERATURE, RaggedBatch, SamplingTensors, Workspace
from fastllama.kernels.decode_state import INACTIVE, NO_TOKEN, DecodeState
from fastllama.kernels.graph import Graph
from fastllama.kernels.paged_cache import LayerCache
from fastllama.kernels.quantized import QuantizedWeight, Weight, concatenated, split
from fastllama.kernels.sampling import masks
from fastllama.kernels.sampling.philox import uniform
from fastllama.kernels.sampling.top_p_torch import nucleus

# Tokens of a row that attend together. Keeps the mask of a long prompt small and skips keys in the tokens' future.
QUERY_BLOCK_TOKENS = 128


def embed(table: Tensor, batch: RaggedBatch, begin: int | None = None) -> Tensor:
    """Embed tokens, h = table[token]: table (V, E) -> (N, E). An id outside the vocabulary reads the first or last row.

    begin: the table is a slice of the vocabulary that starts at this id; other tokens get zeros.
    """
    ids = batch.tokens - (begin or 0)
    inside = ids.clamp(0, table.shape[0] - 1)
    h = F.embedding(inside, table)
    return h if begin is None else h.masked_fill_((ids != inside)[:, None], 0)


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
    """RMSNorm, query/key/value projection, rotary embedding, cache append.

        q, k, v = split(rms_norm(h, norm) · weightᵀ + bias)
        page, place = cache.table[row, position // 64], position % 64
        cache.k[page, :, place], cache.v[page, :, place] = rotate(k), v
        return rotate(q)

    h (N, E), norm (E,), packed weight ((H + 2K)·D, E) and bias, rope (T, D/2, 2) float32 with cos and sin, one layer's
    cache, written at each token's row and position. Returns q (N, H, D). A token at a position outside the cache
    appends nothing that is read.
    """
    return rope_append(_linear(rms_norm(h, norm, eps), weight, bias), rope, cache, batch)


def _linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias: x (N, E), weight (rows, E) -> (N, rows). A quantised weight is dequantised to float32."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    wide = None if bias is None else bias.float()
    return F.linear(x.float(), weight.dequantized(), wide).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) in float32, rounded to the model dtype, then times the weight: x (N, E), weight (E,)."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * weight


def rope_append(heads: Tensor, rope: Tensor, cache: LayerCache, batch: RaggedBatch) -> Tensor:
    """Rotate queries and keys and append keys and values to the cache.

    The pair (a, b) of elements 2i and 2i + 1 becomes (a·cos − b·sin, a·sin + b·cos), in float32, with the angle of the
    token's position, and is rounded to the model dtype. heads (N, (H + 2K)·D), the rest as in `norm_qkv_rope_append`.
    Returns q (N, H, D).
    """
    n_kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
    heads = heads.unflatten(-1, (-1, head_dim))
    pairs = torch.view_as_complex(heads[:, :-n_kv_heads].float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(rope[batch.positions])[:, None]
    rotated = torch.view_as_real(turned).flatten(-2).to(heads.dtype)
    pages, places = cache.places(batch.rows, batch.positions)
    cache.k[pages, :, places] = rotated[:, -n_kv_heads:]
    cache.v[pages, :, places] = heads[:, -n_kv_heads:]
    return rotated[:, :-n_kv_heads]


def attention(q: Tensor, cache: LayerCache, batch: RaggedBatch) -> Tensor:
    """Causal grouped-query attention of each token over its row's cache, up to its own position.

        k, v = the keys and values of the row's pages, one after another
        out[n, h] = softmax(q[n, h] · k[h // G]ᵀ / √D) · v[h // G]    over the positions [0, positions[n]]

    q (N, H, D), one layer's cache -> (N, H·D). The G query heads that share a kv head are G rows of queries against it,
    so that keys and values are read once. Positions after a row's last token have no influence, even if they hold NaN.
    """
    lengths = {segment.keys for segment in batch.segments}
    if batch.is_decode_step and batch.exact and len(lengths) == 1:  # a decode step of equally long rows needs no mask
        return _grouped_attention(q[:, None], *cache.rows(0, q.shape[0], *lengths), None).flatten(1)
    out = torch.empty_like(q)
    for segment in batch.segments:
        row_k, row_v = cache.rows(segment.row, segment.row + 1, segment.keys)
        for begin in range(segment.begin, segment.end, QUERY_BLOCK_TOKENS):
            end = min(begin + QUERY_BLOCK_TOKENS, segment.end)
            keys = segment.keys - (segment.end - end)
            k, v = row_k[:, :, :keys], row_v[:, :, :keys]
            live = torch.arange(keys, device=q.device) <= batch.positions[begin:end, None].clamp(min=0)
            if not batch.exact:  # zero the masked keys and values: their weight is 0, but 0 · NaN is NaN
                k, v = (torch.where(live.any(0)[:, None], tensor, 0) for tensor in (k, v))
            single = batch.exact and end - begin == 1
            out[begin:end] = _grouped_attention(q[None, begin:end], k, v, None if single else live[None])[0]
    return out.flatten(1)


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, live: Tensor | None) -> Tensor:
    """q (B, S, H, D) over k and v (B, K, T, D), masked by live (B, S, T) unless it is None -> (B, S, H, D)."""
    rows, length, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    groups = n_heads // n_kv_heads
    packed = q.view(rows, length, n_kv_heads, groups, head_dim).transpose(1, 2).reshape(rows, n_kv_heads, -1, head_dim)
    mask = None if live is None else live.repeat_interleave(groups, 1)[:, None]
    out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask)
    return out.view(rows, n_kv_heads, length, groups, head_dim).transpose(1, 2).reshape(q.shape)


def linear_residual(
    x: Tensor, weight: Weight, residual: Tensor | None, batch: RaggedBatch, bias: Tensor | None = None
) -> Tensor:
    """residual + (x · weightᵀ + bias), each left out if None: x (N, ·), packed weight (E, ·), bias (E,) -> (N, E).

    The output projection of attention and the down projection of the ffn.
    """
    y = _linear(x, weight, bias)
    return y if residual is None else residual + y


def norm_swiglu(
    h: Tensor, norm: Tensor, weight: Weight, eps: float, batch: RaggedBatch, bias: Tensor | None = None
) -> Tensor:
    """RMSNorm, gate and up projections, SwiGLU: h (N, E), norm (E,), packed weight (2F, E) and bias -> (N, F).

    gate, up = split(rms_norm(h, norm) · weightᵀ + bias)
    return SiLU(gate) · up
    """
    return silu_mul(_linear(rms_norm(h, norm, eps), weight, bias))


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) · up, where SiLU(x) = x / (1 + exp(-x)): gate_up (N, 2F) -> (N, F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def norm_lm_head(h: Tensor, norm: Tensor, weight: Weight, eps: float, batch: RaggedBatch) -> Tensor:
    """rms_norm(h, norm) · weightᵀ: h (M, E) for any M of the batch's tokens -> logits (M, V) in the model dtype."""
    return _linear(rms_norm(h, norm, eps), weight)


def sample(
    logits: Tensor, sampling: SamplingTensors, positions: Tensor, workspace: Workspace | None = None
) -> tuple[Tensor, Tensor]:
    """Sample each row's next token.

        mass    = exp((x - max x) / temperature)
        kept    = tokens with at most top_p · Σ mass before them, in descending order; among equals, lowest ids first
        token   = the first kept token whose running mass exceeds u · Σ kept mass; u = philox.uniform(…) in [0, 1)
        logprob = log softmax(x)[token], before temperature and top-p

    The running mass counts the kept tokens above the lowest kept logit in order of id, then those equal to it: an order
    that needs no sort. temperature or top_p 0 selects the lowest id of the largest logit.

    logits x (B, V) in the model dtype, positions (B,) int64 of the new tokens, which are the random stream's counter.
    With S times as many logits and positions as rows of `sampling`, each row has S adjacent draws.
    Returns tokens (B,) int64 and float32 log-probabilities (B,). A row whose logits hold a NaN or have no finite
    maximum gets NO_TOKEN.
    """
    x = logits.float()
    scores = torch.log_softmax(x, dim=-1)
    tokens = x.argmax(dim=-1)
    if not sampling.greedy:
        if logits.shape[0] > sampling.temperature.shape[0]:
            sampling = sampling.repeated(logits.shape[0] // sampling.temperature.shape[0])
        deterministic = (sampling.temperature == 0) | (sampling.top_p == 0)
        tokens = torch.where(deterministic, tokens, _draw(x, sampling, positions))
    logprobs = scores.gather(-1, tokens[:, None])[:, 0]
    return torch.where(logprobs.isnan(), NO_TOKEN, tokens), logprobs


def _draw(x: Tensor, sampling: SamplingTensors, positions: Tensor) -> Tensor:
    """Token ids (B,) drawn by temperature and top-p from logits x (B, V), in float64."""
    inverse = 1 / sampling.temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
    mass = torch.exp((x - x.amax(-1, keepdim=True)).double() * inverse[:, None])
    limit = torch.where(sampling.top_p >= 1, torch.inf, sampling.top_p * mass.sum(-1))
    keep = nucleus(x, mass, limit)
    lowest = torch.where(keep, x, torch.inf).amin(-1, keepdim=True)
    tied = keep & (x == lowest)
    above = torch.where(keep & ~tied, mass, 0).cumsum(-1)
    kept = above[:, -1:] + torch.where(tied, mass, 0).cumsum(-1)
    target = uniform(sampling.seed, sampling.stream, sampling.call, positions)[:, None] * kept[:, -1:]
    from_above = (above > target).int().argmax(-1)
    from_tied = (tied & (kept > target)).int().argmax(-1)
    return torch.where(target[:, 0] < above[:, -1], from_above, from_tied)


def sample_and_advance(logits: Tensor, state: DecodeState, workspace: Workspace | None = None) -> None:
    """Sample each row's next token, write it to the output, and advance the row, or deactivate it if it ends.

    logits (B, V) in the model dtype; changes the state's B rows in place. A row ends at a stop token, at its last
    position, and at logits that are not numbers, whose token is NO_TOKEN. An inactive row writes nothing.
    """
    following = state.positions + 1
    tokens, logprobs = sample(logits, state.sampling, following, workspace)
    running = state.positions >= 0
    at = torch.where(running, following - state.starts, 0)[None] % state.out_tokens.shape[0]
    for out, new in ((state.out_tokens, tokens), (state.out_logprobs, logprobs)):
        out.scatter_(0, at, torch.where(running, new, out.gather(0, at)))
    known = tokens.clamp(min=0)
    stops = state.is_stop.gather(1, known[:, None])[:, 0]
    ends = (tokens == NO_TOKEN) | stops | (following >= state.last)
    state.tokens.copy_(torch.where(running, known, state.tokens))
    state.positions.copy_(torch.where(running & ~ends, following, INACTIVE))


# For rows with a grammar, and for a step that checks guesses.
mask_logits = masks.mask_logits
window, accept, look_up, put_guess = checking.window, checking.accept, checking.look_up, checking.put_guess


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory for a weight or a cache."""
    return torch.empty(shape, dtype=dtype, device=device)


def pack(*parts: Weight) -> Weight:
    """Concatenate weights (rows_i, E) that are applied to the same input. `unpack` undoes it.

    Quantised weights must have the same format, groups and kinds of scales and offsets.
    """
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        return concatenated(cast(Sequence[QuantizedWeight], parts))
    return tensors[0].contiguous() if len(parts) == 1 else torch.cat(tensors)


def unpack(weight: Weight, rows: Sequence[int]) -> tuple[Weight, ...]:
    """Split a packed weight into its parts, of the given numbers of rows."""
    return split(weight, rows) if isinstance(weight, QuantizedWeight) else torch.split(weight, list(rows))


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
    """The scratch memory that the ops of a step share: plain torch needs none.

    max_tokens_per_row: the most tokens of a row in a decode step. max_tokens: of all rows together; None means as many
    as max_batch_size rows may have.
    """
    return Workspace()


def supports_cuda_graphs(device: torch.device) -> bool:
    """Whether a decode step can be captured: False, since `attention` takes the rows' lengths from the host."""
    return False


def graph_factory(device: torch.device) -> Callable[[], Graph] | None:
    """The class of this backend's own graphs, which record a decode step without CUDA; None: it has none."""
    return None


def uses_dependent_launch() -> bool:
    """Whether kernels are launched as dependent on the previous one, with the current device and options: False."""
    return False
