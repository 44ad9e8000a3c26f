"""What the two projection kernels (`matvec`, `few_tokens`) share: arguments, prefetches, what becomes of finished sums.

A projection is y = epilogue(weight · norm(x)). Its sums come in float32 and are rounded to the model dtype, as Meta's
matmul rounds them, as tiles (BLOCK_ROWS, BLOCK_N): rows of the weight down, tokens across. Then

    none      y, or residual + y
    swiglu    SiLU(gate) in float32, rounded, times up: rows i and i + F of the weight
    rotary    rows 2i and 2i + 1 of a query or key head are turned by their token's angle, in float32, and rounded;
              queries go to q (N, H, D), keys and values to the cache at the token's row and position
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.checks import check_head_dim, check_model_dtype, check_tensor
from fastllama.kernels.dependent import prefetch_block
from fastllama.kernels.ragged import Ragged


class Append(NamedTuple):
    """Where the heads of a query/key/value projection go, besides q. rows must be the cache's."""

    cache_k: Tensor  # (B, K, T, D) in the model dtype
    cache_v: Tensor
    rope: Tensor  # (T, D/2, 2) float32, cos and sin
    positions: Tensor  # (N,) int64
    rows: Tensor  # (N,) int64

    @classmethod
    def to(cls, cache_k: Tensor, cache_v: Tensor, rope: Tensor, batch: Ragged) -> "Append":
        """To the cache, at each of a batch's tokens' row and position."""
        return cls(cache_k, cache_v, rope, batch.positions, batch.rows)

    def query_heads(self, n_tokens: int, out_features: int, dtype: torch.dtype, device: torch.device) -> int:
        """H of a projection to out_features. ValueError for tensors that do not belong together."""
        check_tensor("cache_k", self.cache_k, ("B", "K", "T", "D"), dtype, device)
        _, n_kv_heads, length, head_dim = self.cache_k.shape
        check_head_dim(head_dim)
        check_tensor("cache_v", self.cache_v, tuple(self.cache_k.shape), dtype, device)
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


class Projection(NamedTuple):
    """One call's arguments, checked, as both kernels take them."""

    y: Tensor  # (N, OUT), or q (N, H·D), not yet written
    results: int  # rows of the weight, or half as many where two make one result
    tiles: int  # rows of the weight to a result
    pointers: tuple[Tensor | None, ...]
    length: int  # T of the cache
    dims: dict[str, int | str]  # what the kernels know when they are compiled

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        norm: Tensor | None,
        residual: Tensor | None,
        swiglu: bool,
        append: Append | None,
    ) -> "Projection":
        """Check a projection's tensors and allocate its result. ValueError for what does not belong together."""
        check_model_dtype("x", x)
        how = x.dtype, x.device
        check_tensor("weight", weight, ("rows", "IN"), *how)
        rows, in_features = weight.shape
        check_tensor("x", x, ("N", in_features), *how)
        if norm is not None:
            check_tensor("norm", norm, (in_features,), *how)
        n_tokens = x.shape[0]
        epilogue, tiles, width, length = "none", 1, rows, 0
        n_heads = n_kv_heads = head_dim = 0
        if append is not None:
            n_heads = append.query_heads(n_tokens, rows, *how)
            _, n_kv_heads, length, head_dim = append.cache_k.shape
            epilogue, tiles, width = "rotary", 2, n_heads * head_dim
        elif swiglu:
            if rows % 2:
                raise ValueError(f"a gate and an up projection must have 2·F rows together, got {rows}")
            epilogue, tiles, width = "swiglu", 2, rows // 2
        if residual is not None:
            check_tensor("residual", residual, (n_tokens, width), *how)
            if tiles == 2:
                raise ValueError("only a plain projection takes a residual")
        y = torch.empty(n_tokens, width, dtype=x.dtype, device=x.device)
        return cls(
            y,
            rows // tiles,
            tiles,
            (y, residual, *(append or (None,) * 5)),
            length,
            {
                "IN": in_features,
                "OUT": rows // tiles,
                "H": n_heads,
                "K": n_kv_heads,
                "D": head_dim,
                "EPILOGUE": epilogue,
            },
        )


@triton.jit
def prefetch_tiles(weight_ptr, begin, wanted, OUT, IN, EPILOGUE, N_BYTES):
    """Bring to L2, where `wanted` is 1, N_BYTES of each tile of the weight whose results begin at `begin`.

    One instruction for each block of rows: two tiles for the rotary embedding lie side by side, a gate and an up
    projection far apart.
    """
    begin = begin.to(tl.int64)
    if EPILOGUE == "rotary":
        prefetch_block(weight_ptr + 2 * begin * IN, wanted, 2 * N_BYTES)
    else:
        prefetch_block(weight_ptr + begin * IN, wanted, N_BYTES)
        if EPILOGUE == "swiglu":
            prefetch_block(weight_ptr + (begin + OUT) * IN, wanted, N_BYTES)


@triton.jit
def silu_times(gate, up):
    """SiLU(gate) · up, rounded to the model dtype after each."""
    x = gate.to(tl.float32)
    return (x / (1.0 + tl.exp(-x))).to(gate.dtype) * up


@triton.jit
def turn(even, odd, cos, sin):
    """Pairs of a head's elements turned by their angles, in float32, rounded to the model dtype."""
    a, b = even.to(tl.float32), odd.to(tl.float32)
    return (a * cos - b * sin).to(even.dtype), (a * sin + b * cos).to(even.dtype)


@triton.jit
def store_rotated(
    even,
    odd,
    pairs,
    tokens,
    live,
    q_ptr,
    cache_k_ptr,
    cache_v_ptr,
    rope_ptr,
    positions_ptr,
    rows_ptr,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
):
    """Turn the pairs (even, odd) of query and key heads and put all three kinds where they belong.

    even, odd (BLOCK_PAIRS, BLOCK_N); pairs (BLOCK_PAIRS,) counts through the H query, K key and K value heads;
    tokens (BLOCK_N,); live (BLOCK_PAIRS, BLOCK_N) says which exist.
    """
    head = (pairs // (D // 2))[:, None]
    dim = 2 * (pairs % (D // 2))[:, None]
    exists = tl.max(live.to(tl.int32), 0) > 0
    # A position outside the cache, which a captured graph may hold for a row that has ended, is written nowhere.
    position = tl.load(positions_ptr + tokens, mask=exists, other=-1)
    inside = (position >= 0) & (position < T)
    position = tl.where(inside, position, 0).to(tl.int32)[None, :]
    inside = live & inside[None, :]
    row = tl.load(rows_ptr + tokens, mask=exists, other=0)[None, :]
    is_query = live & (head < H)
    is_key = inside & (head >= H) & (head < H + K)
    turned = inside & (head < H + K)
    cos = tl.load(rope_ptr + position * D + dim, mask=turned, other=1.0)
    sin = tl.load(rope_ptr + position * D + dim + 1, mask=turned, other=0.0)
    first, second = turn(even, odd, cos, sin)
    q_at = q_ptr + (tokens[None, :].to(tl.int64) * H + head) * D + dim
    tl.store(q_at, first, mask=is_query)
    tl.store(q_at + 1, second, mask=is_query)
    key_at = ((row * K + (head - H)) * T + position) * D + dim
    tl.store(cache_k_ptr + key_at, first, mask=is_key)
    tl.store(cache_k_ptr + key_at + 1, second, mask=is_key)
    is_value = inside & (head >= H + K)
    value_at = ((row * K + (head - H - K)) * T + position) * D + dim
    tl.store(cache_v_ptr + value_at, even, mask=is_value)
    tl.store(cache_v_ptr + value_at + 1, odd, mask=is_value)
