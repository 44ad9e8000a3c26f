"""Shared by both projection kernels: prefetches, and epilogues on finished sums.

Sums are float32 tiles (BLOCK_ROWS, BLOCK_N), rows of the weight by tokens. The bias is added, if there is one, and they
are rounded to the model dtype, where Meta's matmul rounds. Then the epilogue computes the results:

    none      y, or residual + y
    swiglu    SiLU(gate) in float32, rounded, times up: rows i and i + F of the weight
    rotary    rows 2i and 2i + 1 of a query or key head are rotated by their token's angle, in float32, and rounded;
              queries go to q (N, H, D), keys and values to the cache at the token's row and position
"""

import triton
import triton.language as tl

from fastllama.kernels.launch.dependent import prefetch_block
from fastllama.kernels.rope import PAGE, rotate
from fastllama.kernels.swiglu import silu_times


@triton.jit
def prefetch_tiles(weight_ptr, begin, wanted, OUT, IN, EPILOGUE, N_BYTES):
    """Prefetch to L2, if `wanted` is 1, N_BYTES of each tile of the weight for the results from `begin` on.

    Uses one instruction per contiguous block: the two tiles of the rotary embedding are adjacent, those of gate and up
    are not.
    """
    begin = begin.to(tl.int64)
    if EPILOGUE == "rotary":
        prefetch_block(weight_ptr + 2 * begin * IN, wanted, 2 * N_BYTES)
    else:
        prefetch_block(weight_ptr + begin * IN, wanted, N_BYTES)
        if EPILOGUE == "swiglu":
            prefetch_block(weight_ptr + (begin + OUT) * IN, wanted, N_BYTES)


@triton.jit
def weight_rows(out, OUT, EPILOGUE: tl.constexpr):
    """The rows of the weight for the results `out`: the second is used by the epilogues with two rows per result."""
    if EPILOGUE == "rotary":
        return 2 * out, 2 * out + 1
    else:
        return out, out + OUT


@triton.jit
def load_bias(bias_ptr, out, live, OUT, EPILOGUE):
    """The biases of the one or two rows of each result, in float32; () if there are none."""
    first, second = weight_rows(out, OUT, EPILOGUE)
    if bias_ptr is None:
        return ()
    elif EPILOGUE == "none":
        return (tl.load(bias_ptr + first, mask=live, other=0.0).to(tl.float32),)
    else:
        bias = tl.load(bias_ptr + first, mask=live, other=0.0).to(tl.float32)
        return bias, tl.load(bias_ptr + second, mask=live, other=0.0).to(tl.float32)


@triton.jit
def load_residual(residual_ptr, out, live):
    """The residual of one token's results; () if there is none."""
    if residual_ptr is None:
        return ()
    else:
        return (tl.load(residual_ptr + out, mask=live, other=0.0),)


@triton.jit
def store_token(
    sums,
    sums_2,
    biases,
    residuals,
    out,
    live,
    y_ptr,
    cache_k_ptr,
    cache_v_ptr,
    pages_ptr,
    rope_ptr,
    positions_ptr,
    rows_ptr,
    T,
    OUT: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """The epilogue of one token: sums (BLOCK_ROWS,) of the results `out`, and sums_2 with two rows per result."""
    y = _with_bias(sums, biases, 0).to(y_ptr.dtype.element_ty)
    if EPILOGUE == "none":
        if len(residuals) > 0:
            y = residuals[0] + y
        tl.store(y_ptr + out, y, mask=live)
    else:
        y_2 = _with_bias(sums_2, biases, 1).to(y_ptr.dtype.element_ty)
        if EPILOGUE == "swiglu":
            tl.store(y_ptr + out, silu_times(y, y_2), mask=live)
        else:
            token = tl.zeros((1,), tl.int32)
            # fmt: off
            rotate_and_store(y[:, None], y_2[:, None], out, token, live[:, None], y_ptr, cache_k_ptr, cache_v_ptr,
                          pages_ptr, rope_ptr, positions_ptr, rows_ptr, T, H, K, D)
            # fmt: on


@triton.jit
def _with_bias(sums, biases, tile: tl.constexpr):
    """Sums of a tile, plus its bias if there is one."""
    if len(biases) > 0:
        sums += biases[tile]
    return sums


@triton.jit
def store_tokens(
    sums,
    sums_2,
    out,
    exists,
    tokens,
    token_exists,
    bias_ptr,
    residual_ptr,
    y_ptr,
    cache_k_ptr,
    cache_v_ptr,
    pages_ptr,
    rope_ptr,
    positions_ptr,
    rows_ptr,
    T,
    OUT: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """The epilogue of several tokens: sums (BLOCK_ROWS, BLOCK_N), and sums_2 with two rows per result."""
    biases = load_bias(bias_ptr, out, exists, OUT, EPILOGUE)
    if len(biases) > 0:
        sums += biases[0][:, None]
    if len(biases) > 1:
        sums_2 += biases[1][:, None]
    y = sums.to(y_ptr.dtype.element_ty)
    live = exists[:, None] & token_exists[None, :]
    if EPILOGUE == "rotary":
        y_2 = sums_2.to(y_ptr.dtype.element_ty)
        # fmt: off
        rotate_and_store(y, y_2, out, tokens, live, y_ptr, cache_k_ptr, cache_v_ptr, pages_ptr, rope_ptr, positions_ptr,
                      rows_ptr, T, H, K, D)
        # fmt: on
    else:
        at = tokens[None, :].to(tl.int64) * OUT + out[:, None]
        if EPILOGUE == "swiglu":
            y = silu_times(y, sums_2.to(y_ptr.dtype.element_ty))
        elif residual_ptr is not None:
            y = tl.load(residual_ptr + at, mask=live, other=0.0) + y
        tl.store(y_ptr + at, y, mask=live)


@triton.jit
def rotate_and_store(
    even,
    odd,
    pairs,
    tokens,
    live,
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
):
    """Rotate the pairs (even, odd) of query and key heads, and store queries to q, keys and values to the cache.

    even, odd (BLOCK_PAIRS, BLOCK_N). pairs (BLOCK_PAIRS,): pair indices over the H query, K key and K value heads.
    tokens (BLOCK_N,). live (BLOCK_PAIRS, BLOCK_N): which elements exist.
    """
    head = (pairs // (D // 2))[:, None]
    dim = 2 * (pairs % (D // 2))[:, None]
    exists = tl.max(live.to(tl.int32), 0) > 0
    # A captured graph may hold a position outside the cache for an inactive row: write nothing for it.
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
    first, second = rotate(even, odd, cos, sin)
    q_at = q_ptr + (tokens[None, :].to(tl.int64) * H + head) * D + dim
    tl.store(q_at, first, mask=is_query)
    tl.store(q_at + 1, second, mask=is_query)
    page_at = pages_ptr + row * (T // PAGE) + position // PAGE
    page = tl.load(page_at, mask=exists[None, :], other=0).to(tl.int64)
    key_at = ((page * K + (head - H)) * PAGE + position % PAGE) * D + dim
    tl.store(cache_k_ptr + key_at, first, mask=is_key)
    tl.store(cache_k_ptr + key_at + 1, second, mask=is_key)
    is_value = inside & (head >= H + K)
    value_at = ((page * K + (head - H - K)) * PAGE + position % PAGE) * D + dim
    tl.store(cache_v_ptr + value_at, even, mask=is_value)
    tl.store(cache_v_ptr + value_at + 1, odd, mask=is_value)
