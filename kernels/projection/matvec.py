"""A projection of one token: y = epilogue(weight · norm(x)), the weight streamed from memory once.

    x (1, IN) → RMSNorm, where there is a norm: each program computes it anew, x is in L2 and the weight is not
    sums      = weight (OUT, IN) · x in float32, rounded to the model dtype
    epilogue  none · + residual · SiLU(gate) · up · rotary embedding and cache append (`projection.py`)

A matrix–vector product is bound by reading the weight: OUT·IN elements, 2·OUT·IN flops. What matters is how many bytes
are on their way from memory at any time: with 4.5 TB/s and 700 ns of latency about 3 MB, or 24 KB a multiprocessor
at the least and several times that in practice. So a program owns a few whole rows, 16 to 32 KB, and requests all of
them in 16-byte loads, held in registers, before it looks at x; four or five programs a multiprocessor keep 112 to 160
KB in flight. There is no loop to wait in, no split of a row over programs and no second launch. Weights are read once a
step: `evict_first` keeps them from driving the cache's keys and values out of L2.

All of that comes before the wait of a dependent launch (`dependent.py`), and so does a prefetch to L2: while the
programs that fit wait for x, memory goes on with the weights of those that will come after them. Then x is requested,
and its norm computed, before the first weight is waited for: the weights come last.
"""

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.elementwise.rope import Append
from fastllama.kernels.elementwise.swiglu import silu_times
from fastllama.kernels.launch.dependent import PREFETCH_BYTES, dependent_launch, let_next_begin, prefetch_bytes, wait
from fastllama.kernels.launch.sizes import ceil_div, power_of_2
from fastllama.kernels.launch.target import Target, current_target
from fastllama.kernels.projection.arguments import Projection
from fastllama.kernels.projection.epilogues import prefetch_tiles, store_rotated

TILE_BYTES = 32768  # of weights that a program holds in registers
BYTES_PER_THREAD = 256  # of weights: 64 of the 128 registers that leave room for four programs of 128 threads
SCALE_BYTES_PER_THREAD = 64  # a norm of more is fetched when it is used, so that registers hold weights instead
PROGRAMS_PER_PROCESSOR = 2.5  # at least, so that reading never pauses for long while programs begin and end
LOAD_BYTES = 16
CHUNK_PER_THREAD = 8  # elements of a row: one 16-byte load of bfloat16
MIN_CHUNK = 256
MAX_WARPS = 16


class Launch(NamedTuple):
    """How a weight is dealt to programs."""

    rows: int  # of each tile
    chunk: int  # elements of a row in one load
    warps: int
    x_first: bool = True  # request x, and know its norm, before the first weight is used


def choose_launch(weight: Tensor, tiles: int) -> Launch | None:
    """Rows per program, chunk and warps for a weight of which a program takes `tiles` tiles of rows; None where a row
    is too long to be held in registers.

        weight (OUT × IN, bf16)        rows          tile    programs / 132      weights a thread
        8B   qkv      6144 ×  4096     2 pairs       32 KB   1536 = 11.6         256 bytes
        8B   output   4096 ×  4096     4             32 KB   1024 =  7.8         256
        8B   gate+up  28672 × 4096     2 + 2         32 KB   7168 = 54.3         256
        8B   down     4096 × 14336     1             28 KB   4096 = 31.0         224
        8B   head   128256 ×  4096     4             32 KB  32064 = 242.9        256
        1B   qkv      3072 ×  2048     4 pairs       32 KB    384 =  2.9         256
        1B   output   2048 ×  2048     4             16 KB    512 =  3.9         128
        1B   gate+up  16384 × 2048     4 + 4         32 KB   2048 = 15.5         256
        1B   down     2048 ×  8192     2             32 KB   1024 =  7.8         256
        1B   head   128256 ×  2048     8             32 KB  16032 = 121.5        256
    """
    return _launch_of(*weight.shape, weight.itemsize, tiles, current_target())


@cache
def _launch_of(out_features: int, in_features: int, itemsize: int, tiles: int, target: Target) -> Launch | None:
    warp_size = target.warp_size
    rows = 1
    while (
        2 * rows * tiles * in_features * itemsize <= TILE_BYTES
        and out_features / (2 * rows * tiles) >= PROGRAMS_PER_PROCESSOR * target.processors
    ):
        rows *= 2
    tile = rows * tiles * in_features * itemsize
    warps = 4
    while tile > warps * warp_size * BYTES_PER_THREAD:
        warps *= 2
    if warps > MAX_WARPS:
        return None
    chunk = CHUNK_PER_THREAD * warp_size * warps
    while chunk > MIN_CHUNK and in_features % chunk:
        chunk //= 2
    if in_features % chunk:  # no whole number of chunks: the last one is masked
        chunk = min(power_of_2(in_features), CHUNK_PER_THREAD * warp_size * warps)
    while warps > 1 and rows * chunk * itemsize < warps * warp_size * LOAD_BYTES:
        warps //= 2
    return Launch(rows, chunk, warps)


@triton.jit
def _load_rows(weight_ptr, rows, LIMIT, IN: tl.constexpr, BLOCK_IN: tl.constexpr, EVEN: tl.constexpr):
    """Rows of the weight, those below LIMIT, as a tuple of tiles (BLOCK_ROWS, BLOCK_IN)."""
    cols = tl.arange(0, BLOCK_IN)
    at = weight_ptr + rows[:, None].to(tl.int64) * IN + cols[None, :]
    chunks = ()
    for i in tl.static_range((IN + BLOCK_IN - 1) // BLOCK_IN):
        if EVEN:
            chunks = chunks + (tl.load(at + i * BLOCK_IN, eviction_policy="evict_first"),)
        else:
            live = (rows < LIMIT)[:, None] & (cols + i * BLOCK_IN < IN)[None, :]
            chunks = chunks + (tl.load(at + i * BLOCK_IN, mask=live, other=0.0, eviction_policy="evict_first"),)
    return chunks


@triton.jit
def _load_tiles(weight_ptr, out, OUT: tl.constexpr, IN: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_IN, EVEN):
    """The one or two tiles of rows that make the results `out`, as `_load_rows` has them."""
    if EPILOGUE == "rotary":
        weights = _load_rows(weight_ptr, 2 * out, 2 * OUT, IN, BLOCK_IN, EVEN)
        weights_2 = _load_rows(weight_ptr, 2 * out + 1, 2 * OUT, IN, BLOCK_IN, EVEN)
    else:
        weights = _load_rows(weight_ptr, out, OUT, IN, BLOCK_IN, EVEN)
        weights_2 = weights
        if EPILOGUE == "swiglu":
            weights_2 = _load_rows(weight_ptr, out + OUT, 2 * OUT, IN, BLOCK_IN, EVEN)
    return weights, weights_2


@triton.jit
def _load_vector(at, IN: tl.constexpr, BLOCK_IN: tl.constexpr):
    """A vector (IN,) as a tuple of tiles (BLOCK_IN,). at: the addresses of the first."""
    cols = tl.arange(0, BLOCK_IN)
    chunks = ()
    for i in tl.static_range((IN + BLOCK_IN - 1) // BLOCK_IN):
        if IN % BLOCK_IN == 0:
            chunks = chunks + (tl.load(at + i * BLOCK_IN),)
        else:
            chunks = chunks + (tl.load(at + i * BLOCK_IN, mask=cols + i * BLOCK_IN < IN, other=0.0),)
    return chunks


@triton.jit
def _inverse_norm(x, eps, IN: tl.constexpr, BLOCK_IN: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of a vector's tiles."""
    squares = tl.zeros((BLOCK_IN,), tl.float32)
    for i in tl.static_range((IN + BLOCK_IN - 1) // BLOCK_IN):
        squares += x[i].to(tl.float32) * x[i].to(tl.float32)
    return tl.rsqrt(tl.sum(squares, 0) / IN + eps)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"])
def _matvec_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    y_ptr,
    residual_ptr,
    cache_k_ptr,
    cache_v_ptr,
    rope_ptr,
    positions_ptr,
    rows_ptr,
    T,
    eps,
    IN: tl.constexpr,
    OUT: tl.constexpr,  # results: rows of the weight, or half as many where two make one
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HOLD_SCALES: tl.constexpr,  # the norm's, in registers from the start
    X_FIRST: tl.constexpr,  # x is requested, and its norm known, before the first weight is used
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,  # bytes of each tile
    RESIDENT: tl.constexpr,  # programs that run at once: theirs are the first weights, those of as many more are next
):
    TWO: tl.constexpr = EPILOGUE != "none"
    EVEN: tl.constexpr = IN % BLOCK_IN == 0 and OUT % BLOCK_ROWS == 0
    CHUNKS: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    out = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = out < OUT
    cols = tl.arange(0, BLOCK_IN)
    x_at = x_ptr + cols
    if X_FIRST and not DEPENDENT:
        x = _load_vector(x_at, IN, BLOCK_IN)
    weights, weights_2 = _load_tiles(weight_ptr, out, OUT, IN, EPILOGUE, BLOCK_IN, EVEN)
    if norm_ptr is not None and HOLD_SCALES:
        scales = _load_vector(norm_ptr + cols, IN, BLOCK_IN)
    if PREFETCH > 0:
        begin = (tl.program_id(0) + RESIDENT) * BLOCK_ROWS
        is_next = (tl.program_id(0) < RESIDENT) & (begin + BLOCK_ROWS <= OUT)
        prefetch_tiles(weight_ptr, begin, is_next.to(tl.int32), OUT, IN, EPILOGUE, PREFETCH)
    wait(DEPENDENT)
    if not X_FIRST:
        let_next_begin(DEPENDENT)
    if not DEPENDENT:
        # Or the compiler starts to multiply when half of the loads are out, and the rest waits behind it.
        tl.debug_barrier()
    if DEPENDENT or not X_FIRST:
        x = _load_vector(x_at, IN, BLOCK_IN)
    if X_FIRST:
        let_next_begin(DEPENDENT)  # which the compiler moves no use of a weight across: requests for x come first
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + out, mask=live, other=0.0)
    if norm_ptr is not None:
        inverse = 0.0
        # Always; but the compiler cannot know, and leaves the first use of a weight behind the branch.
        if (T >= 0) if X_FIRST else True:
            inverse = _inverse_norm(x, eps, IN, BLOCK_IN)
        if not HOLD_SCALES:
            scales = _load_vector(norm_ptr + cols, IN, BLOCK_IN)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_IN), tl.float32)
    if TWO:
        sums_2 = tl.zeros((BLOCK_ROWS, BLOCK_IN), tl.float32)
    for i in tl.static_range(CHUNKS):
        value = x[i].to(tl.float32)
        if norm_ptr is not None:
            value = ((value * inverse).to(x[i].dtype) * scales[i]).to(tl.float32)
        sums += weights[i].to(tl.float32) * value[None, :]
        if TWO:
            sums_2 += weights_2[i].to(tl.float32) * value[None, :]
    y = tl.sum(sums, 1).to(y_ptr.dtype.element_ty)
    if EPILOGUE == "none":
        if residual_ptr is not None:
            y = residual + y
        tl.store(y_ptr + out, y, mask=live)
    else:
        y_2 = tl.sum(sums_2, 1).to(y_ptr.dtype.element_ty)
        if EPILOGUE == "swiglu":
            tl.store(y_ptr + out, silu_times(y, y_2), mask=live)
        else:
            token = tl.zeros((1,), tl.int32)
            # fmt: off
            store_rotated(y[:, None], y_2[:, None], out, token, live[:, None], y_ptr, cache_k_ptr, cache_v_ptr,
                          rope_ptr, positions_ptr, rows_ptr, T, H, K, D)
            # fmt: on


def matvec(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    swiglu: bool = False,
    append: Append | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Project one token, x (1, IN), by weight (rows, IN), in one launch -> (1, OUT).

    norm (IN,) with eps: normalise x first. residual (1, OUT): add it. swiglu: the weight is a gate and an up
    projection of OUT rows each. append: the weight is a query, key and value projection; the result is q (1, H·D).
    launch: in place of `choose_launch`'s. Raises ValueError for what does not belong together, and for rows that
    `choose_launch` finds too long.
    """
    if x.shape[:1] != (1,):
        raise ValueError(f"matvec takes one token, x (1, IN), got {tuple(x.shape)}")
    call = Projection.of(x, weight, norm, residual, swiglu, append)
    launch = launch or choose_launch(weight, call.tiles)
    if launch is None:
        raise ValueError(f"rows of {weight.shape[1]} elements of {weight.dtype} are too long for matvec")
    target, row_bytes = current_target(), weight.shape[1] * weight.itemsize
    resident = max(1, PREFETCH_BYTES // (launch.rows * call.tiles * row_bytes)) * target.processors
    _matvec_kernel[(ceil_div(call.results, launch.rows),)](
        x,
        norm,
        weight,
        *call.pointers,
        call.length,
        eps,
        **call.dims,
        HOLD_SCALES=row_bytes <= launch.warps * target.warp_size * SCALE_BYTES_PER_THREAD,
        X_FIRST=launch.x_first,
        BLOCK_ROWS=launch.rows,
        BLOCK_IN=launch.chunk,
        PREFETCH=prefetch_bytes(row_bytes, launch.rows * row_bytes, launch.rows),
        RESIDENT=resident,
        num_warps=launch.warps,
        **dependent_launch(),
    )
    return call.y
