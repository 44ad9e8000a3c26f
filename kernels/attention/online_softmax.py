"""Shared by `attention_decode` and `attention_prefill`: the loop over keys, its tile sizes, and the dims.

The loop computes the online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Scores
and sums are float32. Only p is rounded to the model dtype, for the product with v. Scores are scaled by log2(e) / √D,
so that p = exp2(score), which is one instruction.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.checks import check_cache, check_head_dim, check_model_dtype, check_tensor
from fastllama.kernels.launch.sizes import ceil_div, next_power_of_2
from fastllama.kernels.launch.target import current_target
from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache

MIN_DOT_ROWS = 16  # smallest size of a matrix instruction's operand, in each direction
MAX_GROUPS = 128
MAX_TILE_HEADS = {2: 64, 4: 16}  # by element size in bytes: what fits in registers beside a tile of keys
MAX_POSITIONS = 2**31 - 2**14  # of all cache rows together: lengths are summed in int32
PAGE = tl.constexpr(PAGE_TOKENS)  # a tile of keys lies in one page
MAX_STREAM_KEYS = PAGE_TOKENS
MAX_STAGES = 5
PAIR_BYTES = 32768  # of a pair: one tile of keys and one tile of values
# Shared memory that needs no opt-in. A launch that uses more may make the GPU repartition shared memory and L1 cache,
# which slows down the launches before and after it.
DEFAULT_SHARED_BYTES = 49152
WIDE_QUERY_BYTES = 16384  # of a tile of queries: from here on four warps have too few registers for the accumulator


class Launch(NamedTuple):
    """Tile sizes and launch options of a program."""

    rows: int  # of the tile of queries
    keys: int  # of a tile of keys
    stages: int
    warps: int


def stream_launch(rows: int, row_bytes: int, itemsize: int, pairs: int = 1) -> Launch:
    """Tiles for few rows of queries, over keys of row_bytes each. Such a program is bound by memory.

    Its speed depends on the number of bytes in flight. 64 keys of 256 bytes (D = 128, 16-bit) and 64 values are 32 KB.
    All stages but one are in flight. Two stages (three for D = 64) need 38,912 (36,864) bytes of shared memory with the
    queries, and three programs fit on a multiprocessor of sm_90 by their registers. Other key sizes get tiles of the
    same bytes. Many heads get smaller tiles, to stay within DEFAULT_SHARED_BYTES if possible. pairs: how many times 32
    KB are in flight, as far as the GPU's shared memory allows.

    float32 has no matrix unit on NVIDIA GPUs: each thread holds the factors of all its scores in registers.
    """
    limit = DEFAULT_SHARED_BYTES if pairs == 1 else current_target().shared_bytes

    def shared(keys: int, stages: int) -> int:
        return 2 * keys * row_bytes * (stages - 1) + rows * (row_bytes + keys * itemsize)

    keys = MAX_STREAM_KEYS
    while keys > MIN_DOT_ROWS and (2 * keys * row_bytes > PAIR_BYTES or shared(keys, 2) > limit):
        keys //= 2
    stages = min(MAX_STAGES, max(2, 1 + pairs * PAIR_BYTES // (2 * keys * row_bytes)))
    while stages > 2 and shared(keys, stages) > limit:
        stages -= 1
    warps = 8 if rows * row_bytes >= WIDE_QUERY_BYTES or (itemsize == 4 and row_bytes > 256) else 4
    return Launch(rows, keys, stages, warps)


class AttentionDims(NamedTuple):
    """The checked dims of a call."""

    n_kv_heads: int  # K
    groups: int  # G
    tile_heads: int  # queries per program: G, or a divisor of G that fits in registers; of several tokens, S·G or fewer
    head_dim: int  # D
    length: int  # T
    tokens_per_row: int  # S, whose heads are packed together

    @classmethod
    def of(cls, q: Tensor, cache: LayerCache, tokens_per_row: int = 1) -> "AttentionDims":
        """Dims of q (N, H, D) and one layer's cache. Raises ValueError if they do not match."""
        check_model_dtype("q", q)
        check_tensor("q", q, ("N", "H", "D"), q.dtype, q.device)
        n_heads, head_dim = q.shape[1:]
        check_head_dim(head_dim)
        check_cache(cache, head_dim, q.dtype, q.device)
        n_kv_heads, n_rows, length = cache.k.shape[1], cache.table.shape[0], cache.length
        if n_kv_heads == 0 or n_heads % n_kv_heads or not 1 <= n_heads // n_kv_heads <= MAX_GROUPS:
            raise ValueError(
                f"H must be a multiple of the cache's {n_kv_heads} kv heads, at most {MAX_GROUPS} times as many, got "
                f'{n_heads} heads: use backend="reference"'
            )
        if n_rows * length > MAX_POSITIONS:
            raise ValueError(f"the cache must have at most {MAX_POSITIONS} positions, got {n_rows} rows of {length}")
        groups = n_heads // n_kv_heads
        most, queries = MAX_TILE_HEADS[q.itemsize], tokens_per_row * groups
        if tokens_per_row == 1:
            tile_heads = max(n for n in range(1, most + 1) if groups % n == 0)
        else:  # tiles of nearly equal size, of which the last may have fewer queries
            tile_heads = ceil_div(queries, ceil_div(queries, most))
        return cls(n_kv_heads, groups, tile_heads, head_dim, length, tokens_per_row)

    @property
    def tiles(self) -> int:
        """Number of tiles of queries per kv head."""
        return ceil_div(self.tokens_per_row * self.groups, self.tile_heads)

    @property
    def block_heads(self) -> int:
        """tile_heads, padded to a valid tile size."""
        return max(MIN_DOT_ROWS, next_power_of_2(self.tile_heads))

    @property
    def block_d(self) -> int:
        """D, padded to a valid tile size."""
        return max(MIN_DOT_ROWS, next_power_of_2(self.head_dim))

    @property
    def scale_log2(self) -> float:
        """log2(e) / √D: the factor of q · k before exp2."""
        return math.log2(math.e) / math.sqrt(self.head_dim)


@triton.jit
def attend(
    q,
    k_ptr,
    v_ptr,
    pages_ptr,
    begin,
    end,
    last,
    scale_log2,
    score_max,
    p_sum,
    acc,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Continue the online softmax of queries q (R, BLOCK_D) over the keys [begin, end) of one row and kv head.

    k_ptr, v_ptr: the kv head of page 0. pages_ptr: the row's pages. begin is a multiple of BLOCK_T, and BLOCK_T divides
    PAGE. Pages are loaded two tiles ahead: the pipeliner issues the copies of a tile one tile ahead, and must not wait.
    score_max (R,): the largest scaled score so far. p_sum (R,): the sum of p. acc (R, BLOCK_D): the sum of p · v.
    MASKED: end need not be a multiple of BLOCK_T, and query r attends to keys up to position last (R,)[r]. Otherwise
    every query attends to every key.
    """
    key = tl.arange(0, BLOCK_T)
    dim = tl.arange(0, BLOCK_D)
    tile = key[:, None] * D + dim[None, :]
    last_page = tl.maximum(end - 1, 0) // PAGE
    first_tile = tl.cast(begin, tl.int32)
    page = tl.load(pages_ptr + tl.minimum(first_tile // PAGE, last_page)).to(tl.int64)
    next_page = tl.load(pages_ptr + tl.minimum((first_tile + BLOCK_T) // PAGE, last_page))
    for first in tl.range(begin, end, BLOCK_T):
        position = tl.cast(first, tl.int32)
        at = (page * (K * PAGE) + position % PAGE) * D
        page = next_page.to(tl.int64)  # a cast: triton does not pipeline a loop that passes its own argument on
        next_page = tl.load(pages_ptr + tl.minimum((position + 2 * BLOCK_T) // PAGE, last_page))
        k_tile = k_ptr + at + tile
        v_tile = v_ptr + at + tile
        if MASKED:
            live = (first + key < end)[:, None] & (dim < D)[None, :]
            k = tl.load(k_tile, mask=live, other=0.0)
            v = tl.load(v_tile, mask=live, other=0.0)
        elif BLOCK_D != D:
            k = tl.load(k_tile, mask=(dim < D)[None, :], other=0.0)
            v = tl.load(v_tile, mask=(dim < D)[None, :], other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where((first + key)[None, :] <= last[:, None], scores, float("-inf"))
        new_max = tl.maximum(score_max, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(score_max - new_max)
        p_sum = p_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        score_max = new_max
    return score_max, p_sum, acc
