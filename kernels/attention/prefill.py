"""Causal grouped-query attention of a ragged batch: any number of tokens per row, each over its row's cache.

    out[n, h] = softmax(q[n, h] · k[row, h // G]ᵀ / √D) · v[row, h // G]    over the positions [0, positions[n]]

Scores and softmax are float32. p is rounded to the model dtype for the product with v, whose sums are float32. The
result is rounded once. q (N, H, D), a layer's cache of pages -> (N, H·D). The cache already holds the tokens' own keys
and values, after those of earlier calls. So the first chunk of a prompt, a later chunk and a continuation are the same
case.

A program serves a block of tokens of one row and one kv head. Its tile of queries has G rows per token, one for each
head that shares the kv head, so that keys and values are read once for all of them. It first loops over the keys before
its first token without a mask, then over the keys of its own tokens with a mask. No N × T matrix is stored. This takes
4·H·D flops per pair of token and position, and reads 2·K·D elements for each of (tokens / block) · T positions, mostly
from L2: bound by the matrix units from a hundred tokens on.

The loop is FlashAttention's: Dao et al., "FlashAttention", 2022, and "FlashAttention-2", 2023.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.attention.online_softmax import PAGE, AttentionDims, Launch, attend, stream_launch
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.launch.checks import check_tensor
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD, current_target
from fastllama.kernels.paged_cache import LayerCache

WARPS = 8
# (rows of queries, keys, stages) by matrix unit and bytes per key. wgmma (Hopper, Blackwell) reads queries from shared
# memory; three stages use half of it. The others hold queries in registers. The accumulator takes a quarter to a half
# of the registers, so fewer rows or keys avoid spills. gfx942 has 64 KB of shared memory.
TILES = {
    "wgmma": {128: (128, 64, 4), 256: (128, 64, 3), 512: (128, 32, 3)},
    "mma": {128: (128, 64, 3), 256: (128, 64, 2), 512: (64, 32, 2)},
    "mfma": {128: (128, 64, 2), 256: (128, 32, 2), 512: (64, 32, 2)},
}


def choose_launch(longest: int, dims: AttentionDims, itemsize: int) -> Launch:
    """Tiles for segments of at most `longest` tokens."""
    few, row_bytes = dims.block_heads, dims.block_d * itemsize
    # float32 has no matrix unit on NVIDIA GPUs: each thread holds the factors of its scores, so tiles have few rows.
    if longest * dims.tile_heads <= few or itemsize == 4:
        return stream_launch(few, row_bytes, itemsize)
    target = current_target()
    is_wgmma = target.backend == "cuda" and 90 <= int(target.arch) < 120
    unit = "mfma" if target.backend == "hip" else "wgmma" if is_wgmma else "mma"
    rows, keys, stages = next(tiles for limit, tiles in TILES[unit].items() if row_bytes <= limit)
    return Launch(max(rows, few), keys, stages, WARPS)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["positions_ptr", "pages_ptr"])
def _attention_prefill_kernel(
    q_ptr,
    cache_k_ptr,
    cache_v_ptr,
    pages_ptr,
    positions_ptr,
    blocks_ptr,
    out_ptr,
    T,
    scale_log2,
    K: tl.constexpr,
    TILES: tl.constexpr,  # tiles of heads per kv head
    G: tl.constexpr,  # heads per tile: all that share the kv head, if they fit in registers
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FEW: tl.constexpr,
):
    # Heads vary fastest, so that the blocks with most keys start first for any K.
    block = tl.program_id(0) // (K * TILES)
    head_tile = tl.program_id(0) % (K * TILES)
    first_token = tl.load(blocks_ptr + block * 3)
    last_token = tl.load(blocks_ptr + block * 3 + 1) - 1
    cache_row = tl.load(blocks_ptr + block * 3 + 2)

    row = tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)
    live_dim = (dim < D)[None, :]
    # Rows past the last token repeat it, so that every row has at least one key. They are not stored.
    token = tl.minimum(first_token + row // G, last_token)
    live = (row < BLOCK_N * G) & (first_token + row // G <= last_token)
    tile = ((token.to(tl.int64) * (K * TILES) + head_tile) * G + row % G)[:, None] * D + dim[None, :]
    q = tl.load(q_ptr + tile, mask=live_dim, other=0.0)
    position = tl.minimum(tl.load(positions_ptr + token), T - 1).to(tl.int32)
    lowest = tl.minimum(tl.load(positions_ptr + first_token), T - 1).to(tl.int32)
    highest = tl.minimum(tl.load(positions_ptr + last_token), T - 1).to(tl.int32)

    head_at = head_tile // TILES * PAGE * D
    k_ptr = cache_k_ptr + head_at
    v_ptr = cache_v_ptr + head_at
    row_pages_ptr = pages_ptr + cache_row.to(tl.int64) * (T // PAGE)
    score_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    p_sum = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    # fmt: off
    unmasked_end = 0
    if not FEW:  # with few rows, memory is the limit and a mask costs less than a second loop
        unmasked_end = (lowest + 1) // BLOCK_T * BLOCK_T
        score_max, p_sum, acc = attend(q, k_ptr, v_ptr, row_pages_ptr, 0, unmasked_end, position, scale_log2,
                                       score_max, p_sum, acc, K, D, BLOCK_T, BLOCK_D, False)
    score_max, p_sum, acc = attend(q, k_ptr, v_ptr, row_pages_ptr, unmasked_end, highest + 1, position, scale_log2,
                                   score_max, p_sum, acc, K, D, BLOCK_T, BLOCK_D, True)
    # fmt: on
    out = (acc / p_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tile, out, mask=live[:, None] & live_dim)


def attention_prefill(q: Tensor, cache: LayerCache, batch: RaggedBatch) -> Tensor:
    """Causal attention of a batch's tokens: q (N, H, D), one layer's cache -> (N, H·D).

    Each token attends to its row's cache up to its own position. Positions after a row's last token have no
    influence, even if they hold NaN. Raises ValueError if tensors do not match.
    """
    dims = AttentionDims.of(q, cache)
    n_tokens = q.shape[0]
    check_tensor("batch.positions", batch.positions, (n_tokens,), torch.int64, q.device)
    _check_segments(batch, n_tokens, cache.table.shape[0])
    out = torch.empty(n_tokens, q.shape[1] * dims.head_dim, dtype=q.dtype, device=q.device)
    if n_tokens == 0:
        return out
    longest = max(segment.end - segment.begin for segment in batch.segments)
    launch = choose_launch(longest, dims, q.itemsize)
    block_n = launch.rows // dims.tile_heads
    blocks = batch.query_blocks(block_n)
    _attention_prefill_kernel[(blocks.shape[0] * dims.n_kv_heads * dims.tiles,)](
        q,
        *cache,
        batch.positions,
        blocks,
        out,
        dims.length,
        dims.scale_log2,
        K=dims.n_kv_heads,
        TILES=dims.tiles,
        G=dims.tile_heads,
        D=dims.head_dim,
        BLOCK_N=block_n,
        BLOCK_R=launch.rows,
        BLOCK_T=launch.keys,
        BLOCK_D=dims.block_d,
        FEW=launch.rows == dims.block_heads,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **FUSED_MULTIPLY_ADD,
    )
    return out


def _check_segments(batch: RaggedBatch, n_tokens: int, n_rows: int) -> None:
    """Raise ValueError unless the segments cover the tokens in order, in rows that the cache has."""
    begin = 0
    for segment in batch.segments:
        if segment.begin != begin or segment.end < begin or not 0 <= segment.row < n_rows:
            raise ValueError(
                f"batch.segments must lie one after the other, in the cache's {n_rows} rows, got {segment} at token "
                f"{begin}"
            )
        begin = segment.end
    if begin != n_tokens:
        raise ValueError(f"batch.segments must be the {n_tokens} tokens of q, got {begin}")
