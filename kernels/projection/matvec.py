"""A projection of one token: y = epilogue(weight · norm(x) + bias). The weight is read from memory once.

    x (1, IN) → RMSNorm, if there is a norm: each program computes it, since x is in L2 and the weight is not
    sums      = weight (OUT, IN) · x + bias (OUT,), if there is one, in float32, rounded to the model dtype
    epilogue  none · + residual · SiLU(gate) · up · rotary embedding and cache append (`epilogues.py`)

A matrix–vector product is bound by reading the weight: OUT·IN elements for 2·OUT·IN flops. Its speed depends on the
bytes in flight. At 4.5 TB/s and 700 ns of latency that is about 3 MB, or at least 24 KB per multiprocessor and several
times that in practice. So a program owns a few complete rows, 16 to 32 KB, and requests all of them in 16-byte loads
into registers before it uses x. Four or five programs per multiprocessor keep 112 to 160 KB in flight. No loop waits
for data, no row is split over programs, and no second launch is needed. Weights are read once per step: `evict_first`
keeps them from evicting the cache's keys and values from L2.

All of this comes before the wait of a dependent launch (`dependent.py`). So does a prefetch to L2: while the running
programs wait for x, memory delivers the weights of the programs after them. After the wait a program requests x and
computes its norm before it waits for the first weight.
"""

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.dependent import (
    PREFETCH_BYTES,
    dependent_launch,
    grid_dependency_wait,
    launch_dependents,
    prefetch_bytes,
)
from fastllama.kernels.launch.sizes import ceil_div, next_power_of_2
from fastllama.kernels.launch.target import Target, current_target
from fastllama.kernels.projection.arguments import Projection
from fastllama.kernels.projection.epilogues import load_bias, load_residual, prefetch_tiles, store_token, weight_rows
from fastllama.kernels.rope import CacheTarget

TILE_BYTES = 32768  # of weights that a program holds in registers
BYTES_PER_THREAD = 256  # of weights: 64 of 128 registers, which allow four programs of 128 threads
SCALE_BYTES_PER_THREAD = 64  # a longer norm weight is loaded when it is used, to leave registers for the weight
PROGRAMS_PER_PROCESSOR = 2.5  # minimum, so that reading never pauses for long while programs start and end
LOAD_BYTES = 16
CHUNK_PER_THREAD = 8  # elements of a row: one 16-byte load of bfloat16
MIN_CHUNK = 256
MAX_WARPS = 16


class Launch(NamedTuple):
    """How a weight is assigned to programs."""

    rows: int  # per tile
    chunk: int  # elements of a row per load
    warps: int
    x_first: bool = True  # request x and compute its norm before the first weight is used


def choose_launch(weight: Tensor, tiles: int) -> Launch | None:
    """Rows per program, chunk and warps for a weight whose programs take `tiles` tiles of rows; None for too long rows.

    weight (OUT × IN, bf16)        rows          tile    programs / 132      weights per thread
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
    if in_features % chunk:  # the last chunk is masked
        chunk = min(next_power_of_2(in_features), CHUNK_PER_THREAD * warp_size * warps)
    while warps > 1 and rows * chunk * itemsize < warps * warp_size * LOAD_BYTES:
        warps //= 2
    return Launch(rows, chunk, warps)


@triton.jit
def _load_rows(weight_ptr, rows, live, IN: tl.constexpr, BLOCK_IN: tl.constexpr, EVEN: tl.constexpr):
    """Load the live ones of these rows of the weight as a tuple of tiles (BLOCK_ROWS, BLOCK_IN)."""
    cols = tl.arange(0, BLOCK_IN)
    at = weight_ptr + rows[:, None].to(tl.int64) * IN + cols[None, :]
    chunks = ()
    for i in tl.static_range((IN + BLOCK_IN - 1) // BLOCK_IN):
        if EVEN:
            chunks = chunks + (tl.load(at + i * BLOCK_IN, eviction_policy="evict_first"),)
        else:
            mask = live[:, None] & (cols + i * BLOCK_IN < IN)[None, :]
            chunks = chunks + (tl.load(at + i * BLOCK_IN, mask=mask, other=0, eviction_policy="evict_first"),)
    return chunks


@triton.jit
def load_tiles(weight_ptr, out, live, OUT: tl.constexpr, IN: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_IN, EVEN):
    """Load the one or two tiles of rows for the results `out`, each as `_load_rows` returns it."""
    first, second = weight_rows(out, OUT, EPILOGUE)
    weights = _load_rows(weight_ptr, first, live, IN, BLOCK_IN, EVEN)
    weights_2 = weights
    if EPILOGUE != "none":
        weights_2 = _load_rows(weight_ptr, second, live, IN, BLOCK_IN, EVEN)
    return weights, weights_2


@triton.jit
def _load_vector(at, IN: tl.constexpr, BLOCK_IN: tl.constexpr):
    """Load a vector (IN,) as a tuple of tiles (BLOCK_IN,). at: the addresses of the first tile."""
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
    """1 / sqrt(mean(x²) + eps) of a vector, given as tiles."""
    squares = tl.zeros((BLOCK_IN,), tl.float32)
    for i in tl.static_range((IN + BLOCK_IN - 1) // BLOCK_IN):
        squares += x[i].to(tl.float32) * x[i].to(tl.float32)
    return tl.rsqrt(tl.sum(squares, 0) / IN + eps)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["positions_ptr", "rows_ptr", "pages_ptr"])
def _matvec_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    y_ptr,
    bias_ptr,
    residual_ptr,
    cache_k_ptr,
    cache_v_ptr,
    pages_ptr,
    rope_ptr,
    positions_ptr,
    rows_ptr,
    T,
    eps,
    IN: tl.constexpr,
    OUT: tl.constexpr,  # results: rows of the weight, or half as many if each result needs two rows
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HOLD_SCALES: tl.constexpr,  # load the norm's weight into registers at the start
    X_FIRST: tl.constexpr,  # request x and compute its norm before the first weight is used
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,  # bytes of each tile
    RESIDENT: tl.constexpr,  # programs that run at once; each prefetches for the program this many places later
):
    TWO_TILES: tl.constexpr = EPILOGUE != "none"
    EVEN: tl.constexpr = IN % BLOCK_IN == 0 and OUT % BLOCK_ROWS == 0
    CHUNKS: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    out = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = out < OUT
    cols = tl.arange(0, BLOCK_IN)
    x_at = x_ptr + cols
    if X_FIRST and not DEPENDENT:
        x = _load_vector(x_at, IN, BLOCK_IN)
    weights, weights_2 = load_tiles(weight_ptr, out, live, OUT, IN, EPILOGUE, BLOCK_IN, EVEN)
    if norm_ptr is not None and HOLD_SCALES:
        scales = _load_vector(norm_ptr + cols, IN, BLOCK_IN)
    biases = load_bias(bias_ptr, out, live, OUT, EPILOGUE)
    if PREFETCH > 0:
        begin = (tl.program_id(0) + RESIDENT) * BLOCK_ROWS
        is_next = (tl.program_id(0) < RESIDENT) & (begin + BLOCK_ROWS <= OUT)
        prefetch_tiles(weight_ptr, begin, is_next.to(tl.int32), OUT, IN, EPILOGUE, PREFETCH)
    grid_dependency_wait(DEPENDENT)
    if not X_FIRST:
        launch_dependents(DEPENDENT)
    if not DEPENDENT:
        # Otherwise the compiler starts to multiply after half of the loads, and the rest waits behind it.
        tl.debug_barrier()
    if DEPENDENT or not X_FIRST:
        x = _load_vector(x_at, IN, BLOCK_IN)
    if X_FIRST:
        launch_dependents(DEPENDENT)  # the compiler moves no use of a weight across it: x is requested first
    residuals = load_residual(residual_ptr, out, live)
    if norm_ptr is not None:
        inverse = 0.0
        # Always true, but the compiler does not know: it keeps the first use of a weight behind the branch.
        if (T >= 0) if X_FIRST else True:
            inverse = _inverse_norm(x, eps, IN, BLOCK_IN)
        if not HOLD_SCALES:
            scales = _load_vector(norm_ptr + cols, IN, BLOCK_IN)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_IN), tl.float32)
    if TWO_TILES:
        sums_2 = tl.zeros((BLOCK_ROWS, BLOCK_IN), tl.float32)
    for i in tl.static_range(CHUNKS):
        value = x[i].to(tl.float32)
        if norm_ptr is not None:
            value = ((value * inverse).to(x[i].dtype) * scales[i]).to(tl.float32)
        sums += weights[i].to(tl.float32) * value[None, :]
        if TWO_TILES:
            sums_2 += weights_2[i].to(tl.float32) * value[None, :]
    # fmt: off
    store_token(tl.sum(sums, 1), tl.sum(sums_2, 1) if TWO_TILES else 0.0, biases, residuals, out, live, y_ptr,
                cache_k_ptr, cache_v_ptr, pages_ptr, rope_ptr, positions_ptr, rows_ptr, T, OUT, H, K, D, EPILOGUE)
    # fmt: on


def matvec(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    swiglu: bool = False,
    append_to: CacheTarget | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Project one token, x (1, IN), by weight (rows, IN), in one launch -> (1, OUT).

    bias (rows,): add it to the sums. norm (IN,) with eps: normalize x first. residual (1, OUT): add it. swiglu: the
    weight is a gate and an up projection of OUT rows each. append_to: the weight is a query, key and value projection;
    the result is q (1, H·D), and keys and values go to this cache. launch: overrides `choose_launch`. Raises ValueError
    if tensors do not match, and for rows that are too long for `choose_launch`.
    """
    if x.shape[:1] != (1,):
        raise ValueError(f"matvec takes one token, x (1, IN), got {tuple(x.shape)}")
    call = Projection.of(x, weight, bias, norm, residual, swiglu, append_to)
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
