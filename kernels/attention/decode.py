"""Grouped-query attention of a decode step: one token per row, each over its own cache row, in one launch.

    out[b, h] = softmax(q[b, h] · k[b, h // G]ᵀ / √D) · v[b, h // G]    over the positions [0, positions[b]]

Scores and softmax are float32. p is rounded to the model dtype for the product with v, whose sums are float32. The
result is rounded once. q (B, H, D), a layer's cache of pages, positions (B,) -> (B, H·D).

Reads 2·K·D elements per position once, for 4·H·D flops: bound by memory. The work is split along the keys
(flash-decoding), so that few or unequal rows still occupy the GPU. The grid does not depend on the lengths, so a CUDA
graph can capture it: (NUM_SPLITS + B) × K programs. A split is a range of one row's keys. Each program reads all
lengths on the device and computes its split. A program without a split returns. A program whose row has one split
writes the result. Otherwise it writes its partial result to scratch memory, and the last program of a row and kv head
to finish merges the splits in order of position, so that repeated runs are equal bit for bit.

All heads that share a kv head form one tile of queries. Where these do not fit in registers (more than 64, in float32
more than 16), there are several tiles, each with its own programs.

Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.attention.online_softmax import PAGE, AttentionDims, attend, stream_launch
from fastllama.kernels.attention.scratch import AttentionScratch
from fastllama.kernels.launch.checks import check_tensor
from fastllama.kernels.launch.dependent import (
    PREFETCH_BYTES,
    dependent_launch,
    prefetch_block,
    prefetch_bytes,
    wait_for_inputs,
)
from fastllama.kernels.launch.sizes import next_power_of_2
from fastllama.kernels.paged_cache import LayerCache

FEW_ROWS, MANY_ROWS = 2, 32  # sizes of BLOCK_B: batches of up to 2 rows and of up to 32 rows share one kernel each
MIN_SPLIT_KEYS = 128  # with shorter splits, merging costs more than splitting saves
MERGE_BYTES = 65536  # of partial results that the merge holds in registers at a time


def merge_block_heads(dims: AttentionDims, rows: int, num_splits: int, itemsize: int) -> int:
    """Number of heads that are merged at a time: four of D = 128, which fit in 128 registers.

    Half as many for float32, and for more rows than splits: the lengths of many rows need registers, too.
    """
    merge_bytes = MERGE_BYTES // 2 if itemsize == 4 or rows > num_splits else MERGE_BYTES
    return max(1, min(next_power_of_2(dims.tile_heads), merge_bytes // (num_splits * dims.block_d * 4)))


@triton.jit
def _find_split(
    positions_ptr,
    split,
    B,
    T,
    NUM_SPLITS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The split of a program -> (row, length of the row, index in the row, splits of the row, keys per split).

    For a program without a split the index is not below the number of splits.
    """
    row = tl.arange(0, BLOCK_B)
    position = tl.load(positions_ptr + row, mask=row < B, other=-1)
    # Clamp: a captured graph may hold a position outside the cache for an inactive row.
    length = tl.where(row < B, tl.minimum(tl.maximum(position + 1, 1), T), 0).to(tl.int32)
    # Splits of at least ⌈sum / NUM_SPLITS⌉ keys: at most NUM_SPLITS per row, at most NUM_SPLITS + B in all.
    min_keys = tl.cdiv(tl.sum(length, 0), NUM_SPLITS * BLOCK_T) * BLOCK_T
    n_splits = tl.cdiv(length, tl.maximum(min_keys, MIN_KEYS))
    ends = tl.cumsum(n_splits, 0)
    split_row = tl.sum((ends <= split).to(tl.int32), 0)
    row_length = tl.sum(tl.where(row == split_row, length, 0), 0)
    row_splits = tl.sum(tl.where(row == split_row, n_splits, 0), 0)
    index = split - tl.sum(tl.where(row == split_row, ends - n_splits, 0), 0)
    # Splits of equal size, in multiples of BLOCK_T. Rounding up may leave fewer of them.
    split_keys = tl.cdiv(row_length, tl.maximum(row_splits, 1) * BLOCK_T) * BLOCK_T
    row_splits = tl.cdiv(row_length, tl.maximum(split_keys, 1))
    return split_row, row_length, index, row_splits, split_keys


@triton.jit
def _prefetch_cache(
    cache_k_ptr,
    cache_v_ptr,
    pages_ptr,
    positions_ptr,
    split,
    head_tile,
    B,
    T,
    n_pages,
    K,
    TILES,
    D,
    KEYS: tl.constexpr,
    KEY_BYTES,
):
    """Prefetch KEYS keys and values of some row to L2, before the wait. Earlier steps have written them.

    Lengths may change until the wait, so which program needs which keys is not known yet: programs take the rows in
    turn. A position that is read too early prefetches the wrong keys and has no other effect. Pages are clamped: any
    value in the table must lead to an address inside the cache.
    """
    row, begin = split % B, split // B * KEYS
    # Clamp before the cast to 32 bits: any value must lead to an address inside the cache.
    length = tl.minimum(tl.maximum(tl.load(positions_ptr + row), 0), T).to(tl.int32)
    for of_page in tl.static_range(0, KEYS, PAGE):
        n_keys = tl.minimum(tl.maximum(length - begin - of_page, 0), PAGE)
        wanted = ((n_keys > 0) & (head_tile % TILES == 0)).to(tl.int32)
        number = tl.minimum((begin + of_page) // PAGE, T // PAGE - 1)
        page = tl.load(pages_ptr + row.to(tl.int64) * (T // PAGE) + number)
        page = tl.minimum(tl.maximum(page, 0), n_pages - 1).to(tl.int64)
        at = (page * K + head_tile // TILES) * (PAGE * D)
        prefetch_block(cache_k_ptr + at, wanted, n_keys * KEY_BYTES)
        prefetch_block(cache_v_ptr + at, wanted, n_keys * KEY_BYTES)


@triton.jit
def _merge_splits(
    acc_ptr,
    score_max_ptr,
    p_sum_ptr,
    out_ptr,
    first_split,
    row_splits,
    head_tile,
    TILES: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the splits of a row for one tile of heads and write its G heads, BLOCK_G at a time."""
    split = tl.arange(0, NUM_SPLITS)
    group = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    for first in tl.range(0, G, BLOCK_G, num_stages=1):
        is_head = first + group < G
        live = (split < row_splits)[:, None] & is_head[None, :]
        at = ((first_split + split).to(tl.int64) * TILES + head_tile)[:, None] * G + (first + group)[None, :]
        live_dim = (dim < D)[None, None, :]
        acc = tl.load(
            acc_ptr + at[:, :, None] * D + dim[None, None, :],
            mask=live[:, :, None] & live_dim,
            other=0.0,
            cache_modifier=".cg",
        )
        score_max = tl.load(score_max_ptr + at, mask=live, other=-1e30, cache_modifier=".cg")
        p_sum = tl.load(p_sum_ptr + at, mask=live, other=0.0, cache_modifier=".cg")
        weight = tl.exp2(score_max - tl.max(score_max, 0)[None, :])
        total = tl.sum(p_sum * weight, 0)
        out = tl.sum(acc * weight[:, :, None], 0) / tl.where(is_head, total, 1.0)[:, None]
        out_at = out_ptr + (first + group)[:, None] * D + dim[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_head[:, None] & (dim < D)[None, :])


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
    TILES: tl.constexpr,  # tiles of heads per kv head
    G: tl.constexpr,  # heads per tile: all that share the kv head, if they fit in registers
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
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
        _prefetch_cache(cache_k_ptr, cache_v_ptr, pages_ptr, positions_ptr, split, head_tile, B, T, n_pages, K, TILES,
                        D, MIN_KEYS, PREFETCH)
        # fmt: on
    wait_for_inputs(DEPENDENT)
    # fmt: off
    row, length, index, row_splits, split_keys = _find_split(positions_ptr, split, B, T, NUM_SPLITS, MIN_KEYS, BLOCK_B,
                                                             BLOCK_T)
    # fmt: on
    if index < row_splits:
        group = tl.arange(0, BLOCK_G)
        dim = tl.arange(0, BLOCK_D)
        live = (group < G)[:, None] & (dim < D)[None, :]
        row_tile = row.to(tl.int64) * (K * TILES) + head_tile
        tile = group[:, None] * D + dim[None, :]
        q = tl.load(q_ptr + row_tile * (G * D) + tile, mask=live, other=0.0)
        head_at = head_tile // TILES * PAGE * D
        begin = index * split_keys
        end = tl.minimum(begin + split_keys, length)
        score_max, p_sum, acc = attend(
            q,
            cache_k_ptr + head_at,
            cache_v_ptr + head_at,
            pages_ptr + row.to(tl.int64) * (T // PAGE),
            begin,
            end,
            tl.zeros((BLOCK_G,), tl.int32) + (end - 1),
            scale_log2,
            tl.full((BLOCK_G,), float("-inf"), tl.float32),
            tl.zeros((BLOCK_G,), tl.float32),
            tl.zeros((BLOCK_G, BLOCK_D), tl.float32),
            K,
            D,
            BLOCK_T,
            BLOCK_D,
            True,
        )
        if row_splits == 1:
            out = (acc / p_sum[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row_tile * (G * D) + tile, out, mask=live)
        else:
            at = (split.to(tl.int64) * (K * TILES) + head_tile) * G
            tl.store(acc_ptr + at * D + tile, acc, mask=live)
            tl.store(score_max_ptr + at + group, score_max, mask=group < G)
            tl.store(p_sum_ptr + at + group, p_sum, mask=group < G)
            tl.debug_barrier()  # all threads must have stored before one thread adds to the counter
            done = tl.atomic_add(counters_ptr + row_tile, 1, sem="acq_rel", scope="gpu")
            if done == row_splits - 1:
                tl.store(counters_ptr + row_tile, 0)
                # fmt: off
                _merge_splits(acc_ptr, score_max_ptr, p_sum_ptr, out_ptr + row_tile * (G * D), split - index,
                              row_splits, head_tile, K * TILES, G, D, NUM_SPLITS, BLOCK_MERGE, BLOCK_D)
                # fmt: on


def attention_decode(
    q: Tensor, cache: LayerCache, positions: Tensor, scratch: AttentionScratch, pairs: int = 1
) -> Tensor:
    """Attention of one token per row: q (B, H, D), one layer's cache -> (B, H·D).

    Token i belongs to cache row i and attends to positions [0, positions[i]], positions (B,) int64. Later positions
    have no influence, even if they hold NaN. pairs: see `stream_launch`. Raises ValueError if tensors do not match, and
    for a scratch of other heads or fewer rows.
    """
    dims = AttentionDims.of(q, cache)
    rows = q.shape[0]
    if cache.table.shape[0] < rows:
        raise ValueError(f"the cache must have a row for each of the {rows} tokens, got {cache.table.shape[0]} rows")
    check_tensor("positions", positions, (rows,), torch.int64, q.device)
    scratch.check(rows, dims, q.device)
    out = torch.empty(rows, q.shape[1] * dims.head_dim, dtype=q.dtype, device=q.device)
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
        G=dims.tile_heads,
        D=dims.head_dim,
        NUM_SPLITS=scratch.num_splits,
        MIN_KEYS=MIN_SPLIT_KEYS,
        BLOCK_B=FEW_ROWS if rows <= FEW_ROWS else max(MANY_ROWS, next_power_of_2(rows)),
        BLOCK_G=launch.rows,
        BLOCK_T=launch.keys,
        BLOCK_D=dims.block_d,
        BLOCK_MERGE=merge_block_heads(dims, rows, scratch.num_splits, q.itemsize),
        PREFETCH=prefetch_bytes(dims.head_dim * q.itemsize, PREFETCH_BYTES // MIN_SPLIT_KEYS),
        num_warps=launch.warps,
        num_stages=launch.stages,
        **dependent_launch(),
    )
    return out
