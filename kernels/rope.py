"""Rotary embedding and cache append of many tokens, after the library's qkv projection (Su et al., 2021).

    q[n, h]                     = rotate(heads[n, h])          H query heads
    cache.k at row, position    = rotate(heads[n, H + k])      K key heads
    cache.v at row, position    = heads[n, H + K + k]          K value heads
    rotate: (a, b) → (a·cos − b·sin, a·sin + b·cos) for the interleaved pairs 2i, 2i + 1, in float32, rounded to the
    model dtype; cos and sin are the table's at the token's position, for plain and scaled rope alike

heads (N, H + 2K, D). Reads and writes N·(H + 2K)·D elements and reads N·D float32 values of cos and sin: bound by
memory. Each program rotates a few heads of one token.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.launch.checks import check_cache, check_head_dim, check_model_dtype, check_tensor
from fastllama.kernels.launch.sizes import ceil_div
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD
from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache

PAGE = tl.constexpr(PAGE_TOKENS)
BLOCK_PAIRS = 512  # of one token: 1024 elements, eight (a 16-byte load) per thread of 128


class CacheTarget(NamedTuple):
    """Where a qkv projection writes its keys and values. rows must exist in the cache."""

    cache: LayerCache
    rope: Tensor  # (T, D/2, 2) float32, cos and sin
    positions: Tensor  # (N,) int64
    rows: Tensor  # (N,) int64

    @classmethod
    def of(cls, cache: LayerCache, rope: Tensor, batch: RaggedBatch) -> "CacheTarget":
        """The cache at each batch token's row and position."""
        return cls(cache, rope, batch.positions, batch.rows)

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the kernels' arguments."""
        return *self.cache, self.rope, self.positions, self.rows

    def query_heads(self, n_tokens: int, out_features: int, dtype: torch.dtype, device: torch.device) -> int:
        """H of a projection to out_features. Raises ValueError if tensors do not match."""
        check_cache(self.cache, "D", dtype, device)
        n_kv_heads, head_dim, length = self.cache.k.shape[1], self.cache.k.shape[3], self.cache.length
        check_head_dim(head_dim)
        check_tensor("rope", self.rope, ("T", head_dim // 2, 2), torch.float32, device)
        if self.rope.shape[0] < length:
            raise ValueError(f"rope must hold the cache's {length} positions, got {self.rope.shape[0]}")
        check_tensor("positions", self.positions, (n_tokens,), torch.int64, device)
        check_tensor("rows", self.rows, (n_tokens,), torch.int64, device)
        n_heads = out_features // head_dim - 2 * n_kv_heads
        if out_features % head_dim or n_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"a weight for {n_kv_heads} kv heads must have (H + {2 * n_kv_heads})·{head_dim} rows with H a "
                f"multiple of {n_kv_heads}, got {out_features} rows"
            )
        return n_heads


@triton.jit
def rotate(even, odd, cos, sin):
    """Rotate pairs of a head's elements by their angles, in float32, rounded to the model dtype."""
    a, b = even.to(tl.float32), odd.to(tl.float32)
    return (a * cos - b * sin).to(even.dtype), (a * sin + b * cos).to(even.dtype)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["positions_ptr", "rows_ptr", "pages_ptr"])
def _rope_append_kernel(
    heads_ptr,
    q_ptr,
    cache_k_ptr,
    cache_v_ptr,
    pages_ptr,
    rope_ptr,
    positions_ptr,
    rows_ptr,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    WIDTH: tl.constexpr = (H + 2 * K) * D
    token = tl.program_id(0)
    position = tl.load(positions_ptr + token)
    row = tl.load(rows_ptr + token)
    elements = 2 * tl.program_id(1) * BLOCK_PAIRS + tl.arange(0, 2 * BLOCK_PAIRS)
    live = elements < WIDTH
    values = tl.load(heads_ptr + token.to(tl.int64) * WIDTH + elements, mask=live, other=0.0)

    pairs = tl.program_id(1) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    angle_at = rope_ptr + position * D + 2 * (pairs % (D // 2))
    # A captured graph may hold a position outside the cache for an inactive row: write nothing for it.
    inside = (position >= 0) & (position < T)
    turned = inside & (pairs < (H + K) * (D // 2))
    cos = tl.load(angle_at, mask=turned, other=1.0)
    sin = tl.load(angle_at + 1, mask=turned, other=0.0)
    even, odd = tl.split(tl.reshape(values, (BLOCK_PAIRS, 2)))
    first, second = rotate(even, odd, cos, sin)
    values = tl.reshape(tl.join(first, second), (2 * BLOCK_PAIRS,))

    head, dim = elements // D, elements % D
    tl.store(q_ptr + token.to(tl.int64) * H * D + elements, values, mask=head < H)
    page = tl.load(pages_ptr + row * (T // PAGE) + position // PAGE, mask=inside, other=0).to(tl.int64)
    key_at = ((page * K + (head - H)) * PAGE + position % PAGE) * D + dim
    tl.store(cache_k_ptr + key_at, values, mask=inside & (head >= H) & (head < H + K))
    value_at = ((page * K + (head - H - K)) * PAGE + position % PAGE) * D + dim
    tl.store(cache_v_ptr + value_at, values, mask=inside & (head >= H + K) & live)


def rope_append(heads: Tensor, rope: Tensor, cache: LayerCache, batch: RaggedBatch) -> Tensor:
    """Rotate queries and keys, and append keys and values to the cache.

    heads (N, (H + 2K)·D), rope (T, D/2, 2) float32, one layer's cache -> q (N, H, D). Raises ValueError if tensors do
    not match.
    """
    check_model_dtype("heads", heads)
    check_tensor("heads", heads, ("N", "(H + 2K)·D"), heads.dtype, heads.device)
    target = CacheTarget.of(cache, rope, batch)
    n_tokens, width = heads.shape
    n_heads = target.query_heads(n_tokens, width, heads.dtype, heads.device)
    n_kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
    q = torch.empty(n_tokens, n_heads, head_dim, dtype=heads.dtype, device=heads.device)
    if n_tokens:
        _rope_append_kernel[(n_tokens, ceil_div(width // 2, BLOCK_PAIRS))](
            heads,
            q,
            *target.pointers,
            cache.length,
            H=n_heads,
            K=n_kv_heads,
            D=head_dim,
            BLOCK_PAIRS=BLOCK_PAIRS,
            num_warps=4,
            **FUSED_MULTIPLY_ADD,
        )
    return q
