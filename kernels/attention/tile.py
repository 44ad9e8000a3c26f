"""What the two attention kernels (`attention_decode`, `attention_prefill`) share: a walk over keys, and their dims.

The walk is the online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018): scores and
their sums stay in float32, only p is rounded to the model dtype for the product with v, whose sums are float32. Scores
are kept in powers of two: log2(e) is folded into the scale 1 / √D, and exp2 is one instruction.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.checks import check_head_dim, check_model_dtype, check_tensor
from fastllama.kernels.launch.sizes import power_of_2
from fastllama.kernels.launch.target import current_target

MIN_DOT_ROWS = 16  # of a matrix instruction, in each direction
MAX_GROUPS = 128
MAX_TILE_HEADS = {2: 64, 4: 16}  # by bytes of an element: what a program's registers hold beside a tile of keys
MAX_POSITIONS = 2**31 - 2**14  # of all cache rows together: lengths are added up in int32
MAX_STREAM_KEYS = 64
MAX_STAGES = 5
PAIR_BYTES = 32768  # of keys and of values that are on their way while others are worked on
# Of shared memory, without asking the driver for more: a launch that has more than this may make it divide a
# multiprocessor's memory anew between shared memory and cache, which the launches before and after feel.
PLAIN_SHARED_BYTES = 49152
WIDE_BYTES = 16384  # of queries, from which four warps have too few registers for the sums of p · v


class Launch(NamedTuple):
    """The tiles of a program."""

    rows: int  # of queries
    keys: int
    stages: int
    warps: int


def stream_launch(rows: int, row_bytes: int, itemsize: int, pairs: int = 1) -> Launch:
    """Tiles for few rows of queries, over keys of row_bytes each: what counts is the bytes on their way from memory.

    64 keys of 256 bytes (D = 128 in half precision) and as many values are 32 KB. All stages but one are on their way:
    two, or three for D = 64, hold 32 KB of shared memory beside the queries, 38,912 and 36,864 bytes in all, and three
    programs fit a multiprocessor of sm_90 by their registers. Smaller and larger keys keep to those bytes, and many
    heads to PLAIN_SHARED_BYTES as far as there are smaller tiles. pairs: so many times 32 KB on their way, where the
    GPU's shared memory allows.

    float32 has no matrix unit on NVIDIA: a thread holds the factors of all its scores, D times their number.
    """
    limit = PLAIN_SHARED_BYTES if pairs == 1 else current_target().shared_bytes

    def shared(keys: int, stages: int) -> int:
        return 2 * keys * row_bytes * (stages - 1) + rows * (row_bytes + keys * itemsize)

    keys = MAX_STREAM_KEYS
    while keys > MIN_DOT_ROWS and (2 * keys * row_bytes > PAIR_BYTES or shared(keys, 2) > limit):
        keys //= 2
    stages = min(MAX_STAGES, max(2, 1 + pairs * PAIR_BYTES // (2 * keys * row_bytes)))
    while stages > 2 and shared(keys, stages) > limit:
        stages -= 1
    warps = 8 if rows * row_bytes >= WIDE_BYTES or (itemsize == 4 and row_bytes > 256) else 4
    return Launch(rows, keys, stages, warps)


class AttentionDims(NamedTuple):
    """The dims of a call, once they are known to belong together."""

    n_kv_heads: int  # K
    groups: int  # G
    tile_heads: int  # of the G heads, those that one program has
    head_dim: int  # D
    length: int  # T

    @classmethod
    def of(cls, q: Tensor, cache_k: Tensor, cache_v: Tensor) -> "AttentionDims":
        """Of q (N, H, D), cache_k and cache_v (B, K, T, D). ValueError for what does not belong together."""
        check_model_dtype("q", q)
        check_tensor("q", q, ("N", "H", "D"), q.dtype, q.device)
        n_heads, head_dim = q.shape[1:]
        check_head_dim(head_dim)
        check_tensor("cache_k", cache_k, ("B", "K", "T", head_dim), q.dtype, q.device)
        check_tensor("cache_v", cache_v, tuple(cache_k.shape), q.dtype, q.device)
        n_rows, n_kv_heads, length, _ = cache_k.shape
        if n_kv_heads == 0 or n_heads % n_kv_heads or not 1 <= n_heads // n_kv_heads <= MAX_GROUPS:
            raise ValueError(
                f"H must be a multiple of the cache's {n_kv_heads} kv heads, at most {MAX_GROUPS} of them, got "
                f'{n_heads} heads: take other heads or a backend="reference"'
            )
        if n_rows * length > MAX_POSITIONS:
            raise ValueError(f"the cache must have at most {MAX_POSITIONS} positions, got {n_rows} rows of {length}")
        groups = n_heads // n_kv_heads
        tile_heads = max(n for n in range(1, MAX_TILE_HEADS[q.itemsize] + 1) if groups % n == 0)
        return cls(n_kv_heads, groups, tile_heads, head_dim, length)

    @property
    def tiles(self) -> int:
        """Tiles of heads that share a kv head."""
        return self.groups // self.tile_heads

    @property
    def block_heads(self) -> int:
        """The heads of a tile, padded to what tiles may have."""
        return max(MIN_DOT_ROWS, power_of_2(self.tile_heads))

    @property
    def block_d(self) -> int:
        """D, padded to what tiles may have."""
        return max(MIN_DOT_ROWS, power_of_2(self.head_dim))

    @property
    def scale_log2(self) -> float:
        """What a product q · k is multiplied by to be a power of two."""
        return math.log2(math.e) / math.sqrt(self.head_dim)


@triton.jit
def attend(
    q,
    k_ptr,
    v_ptr,
    begin,
    end,
    last,
    scale_log2,
    maximum,
    total,
    mixed,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Carry the online softmax of queries (R, BLOCK_D) over the keys [begin, end) of one row and kv head.

    maximum (R,), total (R,) and mixed (R, BLOCK_D) are the scores' maximum, the sum of p and the sum of p · v so far.
    MASKED: end may stand within a tile, and query r sees no key past last (R,)[r]. Otherwise all see all.
    """
    key = tl.arange(0, BLOCK_T)
    dim = tl.arange(0, BLOCK_D)
    tile = key[:, None] * D + dim[None, :]
    for first in tl.range(begin, end, BLOCK_T):
        k_tile = k_ptr + tl.cast(first, tl.int64) * D + tile
        v_tile = v_ptr + tl.cast(first, tl.int64) * D + tile
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
        higher = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        maximum = higher
    return maximum, total, mixed
