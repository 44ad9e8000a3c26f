"""Grouped-query attention of a decode step: one token a row, each over its own row of the cache, in one launch.

    out[b, h] = softmax(q[b, h] · k[b, h // G]ᵀ / √D) · v[b, h // G]    over the positions [0, positions[b]]

Scores and softmax are float32; p is rounded to the model dtype for the product with v, whose sums are float32; the
result is rounded once. q (B, H, D), cache_k and cache_v (B, K, T, D), positions (B,) -> (B, H·D).

Reads 2·K·D elements of every live position once, for 4·H·D flops: bound by memory. So the positions of all rows,
however long each is, are dealt evenly to a number of programs that a captured graph can hold: SPLITS and one more for
each row, times K. Each program reads the lengths on the device and finds the piece of a row that its slot has; slots
without a piece return. A row in several pieces leaves its unnormalised sums, with their maxima, in the scratch memory,
and whoever is last to finish one of its kv heads adds them up in order of position, so that runs repeat bit for bit.

All heads that share a kv head are one tile of queries; more than registers hold (64, in float32 16) are several, with
programs of their own.

Splitting the keys: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.attention.scratch import AttentionScratch
from fastllama.kernels.attention.tile import AttentionDims, attend, stream_launch
from fastllama.kernels.launch.checks import check_tensor
from fastllama.kernels.launch.dependent import (
    PREFETCH_BYTES,
    dependent_launch,
    prefetch_block,
    prefetch_bytes,
    wait_for_inputs,
)
from fastllama.kernels.launch.sizes import power_of_2

FEW_ROWS, MANY_ROWS = 2, 32  # one kernel serves up to the first, another up to the second
MIN_SPLIT_KEYS = 128  # shorter pieces cost more in merging than they gain
MERGED_BYTES = 65536  # of partial sums that the merge holds in registers at a time


def merged_heads(dims: AttentionDims, rows: int, slots: int, itemsize: int) -> int:
    """Heads that the merge adds up at a time: four of D = 128 with 128 registers.

    Half as many where float32 or the lengths of many rows, of which few are in pieces then, need registers too.
    """
    merged_bytes = MERGED_BYTES // 2 if itemsize == 4 or rows > slots else MERGED_BYTES
    return max(1, min(power_of_2(dims.tile_heads), merged_bytes // (slots * dims.block_d * 4)))


@triton.jit
def _deal_slots(
    positions_ptr,
    slot,
    B,
    T,
    SPLITS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The piece that a slot has -> (row, length of the row, index of the piece, pieces of the row, keys of a piece).

    A slot without a piece gets an index that is not below the number of pieces.
    """
    row = tl.arange(0, BLOCK_B)
    position = tl.load(positions_ptr + row, mask=row < B, other=-1)
    # A position outside the cache, which a captured graph may hold for a row that has ended, reads inside all the same.
    length = tl.where(row < B, tl.minimum(tl.maximum(position + 1, 1), T), 0).to(tl.int32)
    # Pieces of at least ⌈sum / SPLITS⌉ keys: a row has at most SPLITS of them, and all rows at most SPLITS + B.
    share = tl.cdiv(tl.sum(length, 0), SPLITS * BLOCK_T) * BLOCK_T
    pieces = tl.cdiv(length, tl.maximum(share, MIN_KEYS))
    ends = tl.cumsum(pieces, 0)
    mine = tl.sum((ends <= slot).to(tl.int32), 0)
    row_length = tl.sum(tl.where(row == mine, length, 0), 0)
    row_pieces = tl.sum(tl.where(row == mine, pieces, 0), 0)
    index = slot - tl.sum(tl.where(row == mine, ends - pieces, 0), 0)
    # Even pieces within the row, of whole tiles; there may be fewer then.
    piece_keys = tl.cdiv(row_length, tl.maximum(row_pieces, 1) * BLOCK_T) * BLOCK_T
    row_pieces = tl.cdiv(row_length, tl.maximum(piece_keys, 1))
    return mine, row_length, index, row_pieces, piece_keys


@triton.jit
def _prefetch_share(cache_k_ptr, cache_v_ptr, positions_ptr, slot, head_tile, B, T, K, TILES, D, KEYS, KEY_BYTES):
    """Bring to L2 keys and values that some program will want: KEYS of a row, which are there since earlier steps.

    Which programs those are is not known before the wait, nor how long rows are; a position that was read too early
    brings the wrong keys, and nothing else. Slots go round the rows.
    """
    row, begin = slot % B, slot // B * KEYS
    # Whatever number stands there, an address inside the cache: cut before it becomes 32 bits.
    length = tl.minimum(tl.maximum(tl.load(positions_ptr + row), 0), T).to(tl.int32)
    n_keys = tl.minimum(tl.maximum(length - begin, 0), KEYS)
    wanted = ((n_keys > 0) & (head_tile % TILES == 0)).to(tl.int32)
    at = ((row.to(tl.int64) * K + head_tile // TILES) * T + begin) * D
    prefetch_block(cache_k_ptr + at, wanted, n_keys * KEY_BYTES)
    prefetch_block(cache_v_ptr + at, wanted, n_keys * KEY_BYTES)


@triton.jit
def _merge_pieces(
    mixed_ptr,
    maxima_ptr,
    totals_ptr,
    out_ptr,
    first_slot,
    pieces,
    head_tile,
    TILES: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up a row's pieces for one tile of heads and write its G heads, BLOCK_G at a time."""
    piece = tl.arange(0, SPLITS)
    group = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    for first in tl.range(0, G, BLOCK_G, num_stages=1):
        is_head = first + group < G
        live = (piece < pieces)[:, None] & is_head[None, :]
        at = ((first_slot + piece).to(tl.int64) * TILES + head_tile)[:, None] * G + (first + group)[None, :]
        live_dim = (dim < D)[None, None, :]
        mixed = tl.load(
            mixed_ptr + at[:, :, None] * D + dim[None, None, :],
            mask=live[:, :, None] & live_dim,
            other=0.0,
            cache_modifier=".cg",
        )
        maxima = tl.load(maxima_ptr + at, mask=live, other=-1e30, cache_modifier=".cg")
        totals = tl.load(totals_ptr + at, mask=live, other=0.0, cache_modifier=".cg")
        weight = tl.exp2(maxima - tl.max(maxima, 0)[None, :])
        total = tl.sum(totals * weight, 0)
        out = tl.sum(mixed * weight[:, :, None], 0) / tl.where(is_head, total, 1.0)[:, None]
        out_at = out_ptr + (first + group)[:, None] * D + dim[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_head[:, None] & (dim < D)[None, :])


@triton.jit(do_not_specialize=["B", "T"], do_not_specialize_on_alignment=["positions_ptr"])
def _attention_decode_kernel(
    q_ptr,
    cache_k_ptr,
    cache_v_ptr,
    positions_ptr,
    out_ptr,
    mixed_ptr,
    maxima_ptr,
    totals_ptr,
    counters_ptr,
    B,
    T,
    scale_log2,
    K: tl.constexpr,
    TILES: tl.constexpr,  # tiles of heads for each kv head
    G: tl.constexpr,  # heads of a tile: all that share the kv head, but for very many
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_MERGE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,  # bytes of a key
):
    slot = tl.program_id(0)
    head_tile = tl.program_id(1)
    if PREFETCH > 0:
        # fmt: off
        _prefetch_share(cache_k_ptr, cache_v_ptr, positions_ptr, slot, head_tile, B, T, K, TILES, D, MIN_KEYS, PREFETCH)
        # fmt: on
    wait_for_inputs(DEPENDENT)
    row, length, index, pieces, piece_keys = _deal_slots(positions_ptr, slot, B, T, SPLITS, MIN_KEYS, BLOCK_B, BLOCK_T)
    if index < pieces:
        group = tl.arange(0, BLOCK_G)
        dim = tl.arange(0, BLOCK_D)
        live = (group < G)[:, None] & (dim < D)[None, :]
        row_tile = row.to(tl.int64) * (K * TILES) + head_tile
        tile = group[:, None] * D + dim[None, :]
        q = tl.load(q_ptr + row_tile * (G * D) + tile, mask=live, other=0.0)
        cache_at = (row.to(tl.int64) * K + head_tile // TILES) * T * D
        begin = index * piece_keys
        end = tl.minimum(begin + piece_keys, length)
        maximum, total, mixed = attend(
            q,
            cache_k_ptr + cache_at,
            cache_v_ptr + cache_at,
            begin,
            end,
            tl.zeros((BLOCK_G,), tl.int32) + (end - 1),
            scale_log2,
            tl.full((BLOCK_G,), float("-inf"), tl.float32),
            tl.zeros((BLOCK_G,), tl.float32),
            tl.zeros((BLOCK_G, BLOCK_D), tl.float32),
            D,
            BLOCK_T,
            BLOCK_D,
            True,
        )
        if pieces == 1:
            out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row_tile * (G * D) + tile, out, mask=live)
        else:
            at = (slot.to(tl.int64) * (K * TILES) + head_tile) * G
            tl.store(mixed_ptr + at * D + tile, mixed, mask=live)
            tl.store(maxima_ptr + at + group, maximum, mask=group < G)
            tl.store(totals_ptr + at + group, total, mask=group < G)
            tl.debug_barrier()  # all threads' stores before the one thread's atomic
            done = tl.atomic_add(counters_ptr + row_tile, 1, sem="acq_rel", scope="gpu")
            if done == pieces - 1:
                tl.store(counters_ptr + row_tile, 0)
                # fmt: off
                _merge_pieces(mixed_ptr, maxima_ptr, totals_ptr, out_ptr + row_tile * (G * D), slot - index, pieces,
                              head_tile, K * TILES, G, D, SPLITS, BLOCK_MERGE, BLOCK_D)
                # fmt: on


def attention_decode(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, positions: Tensor, scratch: AttentionScratch, pairs: int = 1
) -> Tensor:
    """Attention of one token a row: q (B, H, D), one layer's cache_k and cache_v (rows, K, T, D) -> (B, H·D).

    Token i is row i's, at positions (B,) int64, of which every one attends to the cache up to itself. What the cache
    holds past it has no influence, whatever it is. pairs: as `stream_launch` has it. Raises ValueError for tensors that
    do not belong together, and for a scratch of other heads or fewer rows.
    """
    dims = AttentionDims.of(q, cache_k, cache_v)
    rows, length = q.shape[0], cache_k.shape[2]
    if cache_k.shape[0] < rows:
        raise ValueError(f"the cache must have a row for each of the {rows} tokens, got {cache_k.shape[0]} rows")
    check_tensor("positions", positions, (rows,), torch.int64, q.device)
    scratch.check(rows, dims, q.device)
    out = torch.empty(rows, q.shape[1] * dims.head_dim, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    launch = stream_launch(dims.block_heads, dims.block_d * q.itemsize, q.itemsize, pairs)
    _attention_decode_kernel[(scratch.slots + rows, dims.n_kv_heads * dims.tiles)](
        q,
        cache_k,
        cache_v,
        positions,
        out,
        scratch.mixed,
        scratch.maxima,
        scratch.totals,
        scratch.counters,
        rows,
        length,
        dims.scale_log2,
        K=dims.n_kv_heads,
        TILES=dims.tiles,
        G=dims.tile_heads,
        D=dims.head_dim,
        SPLITS=scratch.slots,
        MIN_KEYS=MIN_SPLIT_KEYS,
        BLOCK_B=FEW_ROWS if rows <= FEW_ROWS else max(MANY_ROWS, power_of_2(rows)),
        BLOCK_G=launch.rows,
        BLOCK_T=launch.keys,
        BLOCK_D=dims.block_d,
        BLOCK_MERGE=merged_heads(dims, rows, scratch.slots, q.itemsize),
        PREFETCH=prefetch_bytes(dims.head_dim * q.itemsize, PREFETCH_BYTES // MIN_SPLIT_KEYS),
        num_warps=launch.warps,
        num_stages=launch.stages,
        **dependent_launch(),
    )
    return out
