"""The splits of decode attention: which keys a program reads, the queries that it reads them for, and the merge.

A row's queries that share a kv head are packed: query r is head r % G of the row's token r // G. A program has a tile
of ROWS of them, and partial results lie in the order (split, kv head, query). With one token per row, tiles are
adjacent in q as well, so that addresses need only a tile's number.
"""

import triton
import triton.language as tl

from fastllama.kernels.attention.online_softmax import PAGE
from fastllama.kernels.launch.dependent import prefetch_block


@triton.jit
def find_split(
    positions_ptr,
    split,
    B,
    T,
    S: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The split of a program -> (row, length of the row, index in the row, splits of the row, keys per split).

    A row is as long as its last active token needs. For a program without a split the index is not below the number of
    splits.
    """
    row = tl.arange(0, BLOCK_B)
    if S == 1:
        position = tl.load(positions_ptr + row, mask=row < B, other=-1)
    else:
        token = tl.arange(0, BLOCK_S)
        live = (row < B)[:, None] & (token < S)[None, :]
        position = tl.max(tl.load(positions_ptr + row[:, None] * S + token[None, :], mask=live, other=-1), 1)
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
def prefetch_cache(
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
    S: tl.constexpr,
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
    length = tl.minimum(tl.maximum(tl.load(positions_ptr + row * S), 0), T).to(tl.int32)
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
def query_places(
    head_tile,
    queries,
    K: tl.constexpr,
    TILES: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    S: tl.constexpr,
):
    """Numbers of queries in their tile -> (heads of q to skip, tokens in the row, whether the queries exist).

    Heads are skipped from the tile's first on, with several tokens from the kv head's first in the row. G: heads that
    share a kv head.
    """
    if S == 1:
        return queries, queries * 0, queries < ROWS
    query = head_tile % TILES * ROWS + queries
    token = query // G
    return token * (K * G) + query % G, token, (queries < ROWS) & (query < S * G)


@triton.jit
def merge_splits(
    acc_ptr,
    score_max_ptr,
    p_sum_ptr,
    out_ptr,
    first_split,
    row_splits,
    head_tile,
    K: tl.constexpr,
    TILES: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the splits of a row for one tile of queries and write their results, BLOCK_ROWS at a time.

    out_ptr: where `query_places` counts from.
    """
    split = tl.arange(0, NUM_SPLITS)
    member = tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_D)
    for first in tl.range(0, ROWS, BLOCK_ROWS, num_stages=1):
        queries = first + member
        place, _, is_query = query_places(head_tile, queries, K, TILES, G, ROWS, S)
        live = (split < row_splits)[:, None] & is_query[None, :]
        at = ((first_split + split).to(tl.int64) * (K * TILES) + head_tile)[:, None] * ROWS + queries[None, :]
        if S > 1:  # the last tile may have fewer queries
            of_kv_head = ((first_split + split).to(tl.int64) * K + head_tile // TILES)[:, None] * (S * G)
            at = of_kv_head + (head_tile % TILES * ROWS + queries)[None, :]
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
        out = tl.sum(acc * weight[:, :, None], 0) / tl.where(is_query, total, 1.0)[:, None]
        out_at = out_ptr + place[:, None] * D + dim[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & (dim < D)[None, :])
