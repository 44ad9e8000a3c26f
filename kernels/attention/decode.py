"""Grouped-query attention of a decode step: S tokens per row, all over their row of the cache, in one launch.

    out[b, h] = softmax(q[b, h] · k[b, h // G]ᵀ / √D) · v[b, h // G]    over the positions [0, positions[b]]

Scores and softmax are float32. p is rounded to the model dtype for the product with v, whose sums are float32. The
result is rounded once. q (B·S, H, D), a layer's cache of pages, positions (B·S,) -> (B·S, H·D). S is 1, or more
where a step checks guesses.

Reads 2·K·D elements per position once, for 4·H·D flops: bound by memory. The work is split along the keys
(flash-decoding), so that few or unequal rows still occupy the GPU. The grid does not depend on the lengths, so a CUDA
graph can capture it: (NUM_SPLITS + B) × K programs. A split is a range of one row's keys. Each program reads all
lengths on the device and computes its split. A program without a split returns. A program whose row has one split
writes the result. Otherwise it writes its partial result to scratch memory, and the last program of a row and kv head
to finish merges the splits in order of position, so that repeated runs are equal bit for bit.

All heads of a row's tokens that share a kv head form one tile of queries, so each key is read once for all of them.
Where these do not fit in registers (more than 64, in float32 more than 16), there are several tiles, each with its own
programs.

Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.attention.online_softmax import PAGE, AttentionDims, Launch, attend, stream_launch
from fastllama.kernels.attention.scratch import AttentionScratch
from fastllama.kernels.attention.splits import find_split, merge_splits, prefetch_cache, query_places
from fastllama.kernels.launch.checks import check_tensor
from fastllama.kernels.launch.dependent import (
    PREFETCH_BYTES,
    dependent_launch,
    prefetch_bytes,
    wait_for_inputs,
)
from fastllama.kernels.launch.sizes import next_power_of_2
from fastllama.kernels.paged_cache import LayerCache

FEW_ROWS, MANY_ROWS = 2, 32  # sizes of BLOCK_B: batches of up to 2 rows and of up to 32 rows share one kernel each
MIN_SPLIT_KEYS = 128  # with shorter splits, merging costs more than splitting saves
MERGE_BYTES = 65536  # of partial results that the merge holds in registers at a time
MANY_QUERIES = 32  # of a tile: more are merged in smaller parts


def merge_block_heads(dims: AttentionDims, rows: int, num_splits: int, itemsize: int) -> int:
    """Number of heads that are merged at a time: four of D = 128, which fit in 128 registers.

    Half as many for float32, for more rows than splits, whose lengths need registers, too, and for the many queries of
    several tokens.
    """
    many = rows > num_splits or (dims.tokens_per_row > 1 and dims.tile_heads > MANY_QUERIES)
    merge_bytes = MERGE_BYTES // 2 if itemsize == 4 or many else MERGE_BYTES
    return max(1, min(next_power_of_2(dims.tile_heads), merge_bytes // (num_splits * dims.block_d * 4)))


def choose_warps(dims: AttentionDims, launch: Launch, itemsize: int) -> int:
    """Warps of a program. For several tokens the fewest that need no spills, so that more programs are resident."""
    if dims.tokens_per_row == 1:
        return launch.warps
    return 4 if itemsize == 2 and dims.block_d <= 128 else 8


@triton.jit(do_not_specialize=["B", "T", "n_pages"], do_not_specialize_on_alignment=["positions_ptr", "pages_ptr"])
def _attention_decode_kernel(
    q_ptr,
    cache_k_ptr,
    cache_v_ptr,
    pages_ptr,
    positions_ptr,
    out_ptr,
    acc_ptr,
    score_max_ptr,
    p_sum_ptr,
    counters_ptr,
    B,
    T,
    n_pages,
    scale_log2,
    K: tl.constexpr,
    TILES: tl.constexpr,  # tiles of queries per kv head
    G: tl.constexpr,  # heads that share a kv head
    ROWS: tl.constexpr,  # queries per tile: all that share the kv head, if they fit in registers
    S: tl.constexpr,  # tokens per row
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_MERGE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,  # bytes of a key, or 0
):
    split = tl.program_id(0)
    head_tile = tl.program_id(1)
    if PREFETCH > 0:
        # fmt: off
        prefetch_cache(cache_k_ptr, cache_v_ptr, pages_ptr, positions_ptr, split, head_tile, B, T, n_pages, K, TILES,
                       D, S, MIN_KEYS, PREFETCH)
        # fmt: on
    wait_for_inputs(DEPENDENT)
    # fmt: off
    row, length, index, row_splits, split_keys = find_split(positions_ptr, split, B, T, S, NUM_SPLITS, MIN_KEYS,
                                                            BLOCK_B, BLOCK_S, BLOCK_T)
    # fmt: on
    if index < row_splits:
        query = tl.arange(0, BLOCK_ROWS)
        dim = tl.arange(0, BLOCK_D)
        place, token, is_query = query_places(head_tile, query, K, TILES, G, ROWS, S)
        live = is_query[:, None] & (dim < D)[None, :]
        row_tile = row.to(tl.int64) * (K * TILES) + head_tile
        tile = place[:, None] * D + dim[None, :]
        first = row_tile * (ROWS * D)
        if S > 1:  # the row's first token, this kv head
            first = (row.to(tl.int64) * (S * K) + head_tile // TILES) * (G * D)
        q = tl.load(q_ptr + first + tile, mask=live, other=0.0)
        head_at = head_tile // TILES * PAGE * D
        begin = index * split_keys
        end = tl.minimum(begin + split_keys, length)
        k_ptr = cache_k_ptr + head_at
        v_ptr = cache_v_ptr + head_at
        row_pages_ptr = pages_ptr + row.to(tl.int64) * (T // PAGE)
        last = tl.zeros((BLOCK_ROWS,), tl.int32) + (end - 1)
        no_score = float("-inf")
        if S > 1:
            # A token attends to keys up to its own. An inactive one attends to the first key: its result is not used.
            position = tl.load(positions_ptr + row * S + token, mask=is_query, other=0)
            last = tl.minimum(tl.maximum(position, 0), length - 1).to(tl.int32)
            no_score = -1e30  # a split may lie after all that a token attends to: its weight must be 0, not NaN
        # fmt: off
        score_max, p_sum, acc = attend(q, k_ptr, v_ptr, row_pages_ptr, begin, end, last, scale_log2,
                                       tl.full((BLOCK_ROWS,), no_score, tl.float32),
                                       tl.zeros((BLOCK_ROWS,), tl.float32),
                                       tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32), K, D, BLOCK_T, BLOCK_D, True)
        # fmt: on
        if row_splits == 1:
            out = (acc / p_sum[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + first + tile, out, mask=live)
        else:
            at = (split.to(tl.int64) * (K * TILES) + head_tile) * ROWS
            if S > 1:  # the last tile of a kv head may have fewer queries
                at = (split.to(tl.int64) * K + head_tile // TILES) * (S * G) + head_tile % TILES * ROWS
            tl.store(acc_ptr + at * D + (query[:, None] * D + dim[None, :]), acc, mask=live)
            tl.store(score_max_ptr + at + query, score_max, mask=is_query)
            tl.store(p_sum_ptr + at + query, p_sum, mask=is_query)
            tl.debug_barrier()  # all threads must have stored before one thread adds to the counter
            done = tl.atomic_add(counters_ptr + row_tile, 1, sem="acq_rel", scope="gpu")
            if done == row_splits - 1:
                tl.store(counters_ptr + row_tile, 0)
                # fmt: off
                merge_splits(acc_ptr, score_max_ptr, p_sum_ptr, out_ptr + first, split - index, row_splits, head_tile,
                             K, TILES, G, ROWS, S, D, NUM_SPLITS, BLOCK_MERGE, BLOCK_D)
                # fmt: on


def attention_decode(
    q: Tensor,
    cache: LayerCache,
    positions: Tensor,
    scratch: AttentionScratch,
    pairs: int = 1,
    tokens_per_row: int = 1,
) -> Tensor:
    """Attention of S tokens per row: q (B·S, H, D), one layer's cache -> (B·S, H·D).

    Tokens [i·S, (i + 1)·S) belong to cache row i. A token attends to positions [0, its own], positions (B·S,) int64.
    Later positions have no influence, even if they hold NaN. A token at a negative position is inactive: its result is
    not defined, but finite. pairs: see `stream_launch`. Raises ValueError if tensors do not match, and for a scratch of
    other heads or fewer rows or tokens.
    """
    size = tokens_per_row
    dims = AttentionDims.of(q, cache, size)
    rows = q.shape[0] // size
    if rows * size != q.shape[0]:
        raise ValueError(f"q must have {size} tokens for each row, got {q.shape[0]} tokens")
    if cache.table.shape[0] < rows:
        raise ValueError(f"the cache must have a row for each of the {rows} tokens, got {cache.table.shape[0]} rows")
    check_tensor("positions", positions, (q.shape[0],), torch.int64, q.device)
    scratch.check(rows, dims, q.device)
    out = torch.empty(q.shape[0], q.shape[1] * dims.head_dim, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    launch = stream_launch(dims.block_heads, dims.block_d * q.itemsize, q.itemsize, pairs)
    _attention_decode_kernel[(scratch.num_splits + rows, dims.n_kv_heads * dims.tiles)](
        q,
        *cache,
        positions,
        out,
        scratch.acc,
        scratch.score_max,
        scratch.p_sum,
        scratch.counters,
        rows,
        cache.length,
        cache.k.shape[0],
        dims.scale_log2,
        K=dims.n_kv_heads,
        TILES=dims.tiles,
        G=dims.groups,
        ROWS=dims.tile_heads,
        S=size,
        D=dims.head_dim,
        NUM_SPLITS=scratch.num_splits,
        MIN_KEYS=MIN_SPLIT_KEYS,
        BLOCK_B=FEW_ROWS if rows <= FEW_ROWS else max(MANY_ROWS, next_power_of_2(rows)),
        BLOCK_S=next_power_of_2(size),
        BLOCK_ROWS=launch.rows,
        BLOCK_T=launch.keys,
        BLOCK_D=dims.block_d,
        BLOCK_MERGE=merge_block_heads(dims, rows, scratch.num_splits, q.itemsize),
        PREFETCH=prefetch_bytes(dims.head_dim * q.itemsize, PREFETCH_BYTES // MIN_SPLIT_KEYS),
        num_warps=choose_warps(dims, launch, q.itemsize),
        num_stages=launch.stages,
        **dependent_launch(),
    )
    return out
