"""A projection of 2 to 16 tokens: y = epilogue(weight · norm(x)ᵀ + bias) on the matrix units. The weight is read once.

    x (N, IN) → x · norm, if there is a norm, rounded to the model dtype; the squares of x are summed in the same loop
    sums      = weight (OUT, IN) · xᵀ in float32, times 1 / sqrt(mean(x²) + eps), rounded to the model dtype
    epilogue  none · + residual · SiLU(gate) · up · rotary embedding and cache append (`epilogues.py`)

Bound by reading the weight: OUT·IN elements for 2·N·OUT·IN flops. The weight is the left operand, in tiles of
BLOCK_ROWS rows. The tokens, padded to 8 or 16, are the right operand, so that few columns of a matrix instruction are
wasted. Multiplying and adding without matrix units would take most of the issue slots from 2 tokens on. A pipeline of
asynchronous copies keeps 96 to 192 KB per multiprocessor in flight (`choose_launch`).

RMSNorm divides each token by one number, which can be done after the product. So every program reads x once, for the
product, and divides at the end. It need not know x before it uses the first weight, and no other kernel or collective
has to provide the norm of x. Meta rounds the quotient before it is scaled; this code rounds the scaled x, which in
float16 must stay below 65,504.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.dependent import PREFETCH_BYTES, dependent_launch, prefetch_bytes, wait_for_inputs
from fastllama.kernels.launch.sizes import ceil_div, next_power_of_2
from fastllama.kernels.launch.target import Target, current_target
from fastllama.kernels.projection.arguments import Projection
from fastllama.kernels.projection.epilogues import prefetch_tiles, store_tokens, weight_rows
from fastllama.kernels.rope import CacheTarget

MAX_TOKENS = 16
MIN_COLUMNS, MIN_COLUMNS_AMD = 8, 16  # columns of a matrix instruction's right operand
ROWS = (64, 32, 16)  # per tile: the largest that gives most multiprocessors two programs, or one
# Programs per multiprocessor; a few multiprocessors may idle. With two, one multiplies while the other waits for data.
TWO_PROGRAMS, ONE_PROGRAM = 1.4, 0.7
ROWS_PER_COLUMN = 2  # minimum for two programs: every program reads all tokens, from L2
CHUNK_BYTES = 256  # of a row in one stage, per accumulator
MIN_STAGE_BYTES = 8192  # so that programs rarely wait for a stage
# What a multiprocessor of an H200 reads while it issues the 8 dependent matrix instructions of a chunk, which wait
# about 33 cycles each for the previous sums: 4.5 KB at 17 bytes per cycle, and a third more for the rest of a stage.
DOT_LATENCY_BYTES = 6144
BYTES_IN_FLIGHT = 98304  # per multiprocessor
STAGES = (3, 8)  # fewest and most
ROWS_PER_WARP = 16  # rows of a matrix instruction's left operand, whose right operand has MIN_COLUMNS columns
MAX_WARPS = 4
MAX_ACCUMULATORS = 4  # on GPUs with much shared memory and fast memory; two on others
SHARED_BYTES_SPARE = 2048  # for data that the threads of a program exchange


class Launch(NamedTuple):
    """How a weight is assigned to programs."""

    rows: int  # per tile
    chunk: int  # elements of a row per accumulator and stage
    stages: int
    warps: int
    accumulators: int = 1  # used in turn by successive chunks, so that none waits for its own last sums


# float32 has no matrix instructions here: threads hold the factors of all their sums, so many small tiles are best.
FLOAT32_LAUNCH = Launch(rows=16, chunk=32, stages=4, warps=4)


def choose_launch(weight: Tensor, tiles: int, columns: int, target: Target) -> Launch:
    """Tile sizes and launch options for a weight: `tiles` tiles of rows per program, tokens padded to `columns`.

    weight (OUT × IN, bf16)      rows at 8, 16 columns    programs / 132     accumulators    stages
    8B  qkv      6144 ×  4096    16 pairs                  192 = 1.5         1               8
    8B  output   4096 ×  4096    16, 32                    256, 128          2, 1            7, 8
    8B  gate+up 28672 ×  4096    64 + 64                   224 = 1.7         1               3
    8B  down     4096 × 14336    16, 32                    256, 128          2, 1            7, 8
    8B  head   128256 ×  4096    64                       2004 = 15.2        1               3
    1B  qkv      3072 ×  2048    16 pairs                   96 = 0.7         2               7
    1B  output   2048 ×  2048    16                        128 = 1.0         2               8
    1B  gate+up 16384 ×  2048    32 + 32                   256 = 1.9         1               4
    1B  down     2048 ×  8192    16                        128 = 1.0         2               8
    """
    if weight.dtype == torch.float32:
        return FLOAT32_LAUNCH
    return _launch_of(weight.shape[0] // tiles, weight.shape[1], weight.itemsize, tiles, columns, target)


@cache
def _launch_of(results: int, in_features: int, itemsize: int, tiles: int, columns: int, target: Target) -> Launch:
    rows = choose_rows(results, tiles, columns, target.processors)
    chunk = min(CHUNK_BYTES // itemsize, max(16, next_power_of_2(in_features)))
    stage = rows * tiles * chunk * itemsize
    min_stage = max(MIN_STAGE_BYTES, DOT_LATENCY_BYTES * rows * target.processors // results)
    accumulators, most = 1, MAX_ACCUMULATORS if target.shared_bytes > 2 * BYTES_IN_FLIGHT else 2
    while accumulators < most and stage < min_stage and in_features % (2 * accumulators * chunk) == 0:
        accumulators, stage = 2 * accumulators, 2 * stage
    resident = max(1, min(4, round(results / (rows * target.processors))))
    fewest, most = STAGES
    stages = min(max(BYTES_IN_FLIGHT // (stage * resident) + 1, fewest), most)
    stage += accumulators * columns * chunk * itemsize
    for at_least, programs in ((fewest, min(resident, 2)), (1, 1)):
        while stages > at_least and programs * (stages * stage + SHARED_BYTES_SPARE) > target.shared_bytes:
            stages -= 1
    # With two tiles at least two warps: one would have too few registers for the norm of x.
    warps = max(tiles, rows // ROWS_PER_WARP * (columns // MIN_COLUMNS))
    return Launch(rows, chunk, stages, min(warps, MAX_WARPS), accumulators)


def choose_rows(results: int, tiles: int, columns: int, processors: int) -> int:
    """Rows per tile: the largest that gives two programs per multiprocessor with few reads of tokens, else one."""
    for rows in ROWS:
        if rows * tiles >= ROWS_PER_COLUMN * columns and results >= rows * TWO_PROGRAMS * processors:
            return rows
    return next((rows for rows in ROWS if results >= rows * ONE_PROGRAM * processors), ROWS[-1])


@triton.jit
def load_tile(at, live, EVEN: tl.constexpr):
    """Load a tile, masked by `live` unless EVEN: then the complete tile exists."""
    return tl.load(at) if EVEN else tl.load(at, mask=live, other=0)


@triton.jit
def sum_accumulators(sums):
    """The sum of all accumulators."""
    total = sums[0]
    for i in tl.static_range(1, len(sums)):
        total += sums[i]
    return total


@triton.jit
def _multiply(
    x_ptr,
    norm_ptr,
    weight_ptr,
    first,
    second,
    tokens,
    exists,
    token_exists,
    eps,
    IN: tl.constexpr,
    TWO_TILES: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
):
    """Rows `first`, and with TWO_TILES `second`, of the weight, times norm(x)ᵀ -> two tiles (BLOCK_ROWS, BLOCK_N)."""
    cols = tl.arange(0, BLOCK_IN)
    weight_at = weight_ptr + first[:, None].to(tl.int64) * IN + cols[None, :]
    weight_2_at = weight_ptr + second[:, None].to(tl.int64) * IN + cols[None, :]
    x_at = x_ptr + tokens[None, :] * IN + cols[:, None]
    if norm_ptr is not None:
        squares = tl.zeros((BLOCK_IN, BLOCK_N), tl.float32)
    sums = (tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32),) * ACCUMULATORS
    sums_2 = (tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32),) * ACCUMULATORS
    for step in range(0, IN, ACCUMULATORS * BLOCK_IN):
        for i in tl.static_range(ACCUMULATORS):
            begin = step + i * BLOCK_IN
            inside = cols + begin < IN
            live = exists[:, None] & inside[None, :]
            weight = load_tile(weight_at + begin, live, EVEN)
            if TWO_TILES:
                weight_2 = load_tile(weight_2_at + begin, live, EVEN)
            if EVEN:
                x = tl.load(x_at + begin, mask=token_exists[None, :], other=0.0)
            else:
                x = tl.load(x_at + begin, mask=inside[:, None] & token_exists[None, :], other=0.0)
            if norm_ptr is not None:
                wide = x.to(tl.float32)
                squares += wide * wide
                x = x * load_tile(norm_ptr + begin + cols, inside, EVEN)[:, None]
            # Each chunk uses the accumulator whose last sums are oldest.
            sums = sums[1:] + (tl.dot(weight, x, sums[0], input_precision="ieee"),)
            if TWO_TILES:
                sums_2 = sums_2[1:] + (tl.dot(weight_2, x, sums_2[0], input_precision="ieee"),)
    sums, sums_2 = sum_accumulators(sums), sum_accumulators(sums_2)
    if norm_ptr is not None:
        inverse = tl.rsqrt(tl.sum(squares, 0) / IN + eps)[None, :]
        sums *= inverse
        sums_2 *= inverse
    return sums, sums_2


@triton.jit(do_not_specialize=["T", "N"], do_not_specialize_on_alignment=["positions_ptr", "rows_ptr", "pages_ptr"])
def _few_tokens_kernel(
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
    N,
    IN: tl.constexpr,
    OUT: tl.constexpr,  # results: rows of the weight, or half as many if each result needs two rows
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,  # bytes of each tile, from its first row on
    RESIDENT: tl.constexpr,  # programs that run at once: later ones do not wait, so they prefetch nothing
):
    TWO_TILES: tl.constexpr = EPILOGUE != "none"
    if PREFETCH > 0:
        begin_out = tl.program_id(0) * BLOCK_ROWS
        waits = (tl.program_id(0) < RESIDENT) & (begin_out + BLOCK_ROWS <= OUT)
        prefetch_tiles(weight_ptr, begin_out, waits.to(tl.int32), OUT, IN, EPILOGUE, PREFETCH)
    wait_for_inputs(DEPENDENT)
    EVEN: tl.constexpr = IN % (ACCUMULATORS * BLOCK_IN) == 0 and OUT % BLOCK_ROWS == 0
    out = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = tl.arange(0, BLOCK_N)
    exists, token_exists = out < OUT, tokens < N
    first, second = weight_rows(out, OUT, EPILOGUE)
    # fmt: off
    sums, sums_2 = _multiply(x_ptr, norm_ptr, weight_ptr, first, second, tokens, exists, token_exists, eps,
                             IN, TWO_TILES, EVEN, BLOCK_N, BLOCK_ROWS, BLOCK_IN, ACCUMULATORS)
    # fmt: on
    # fmt: off
    store_tokens(sums, sums_2, out, exists, tokens, token_exists, bias_ptr, residual_ptr, y_ptr, cache_k_ptr,
                 cache_v_ptr, pages_ptr, rope_ptr, positions_ptr, rows_ptr, T, OUT, H, K, D, EPILOGUE)
    # fmt: on


def few_tokens(
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
    """Project up to 16 tokens, x (N, IN), by weight (rows, IN), in one launch -> (N, OUT).

    bias (rows,): add it to the sums. norm (IN,) with eps: normalize x first. residual (N, OUT): add it. swiglu: the
    weight is a gate and an up projection of OUT rows each. append_to: the weight is a query, key and value projection;
    the result is q (N, H·D), and keys and values go to this cache. launch: overrides `choose_launch`. Raises ValueError
    if tensors do not match.
    """
    if not 1 <= x.shape[0] <= MAX_TOKENS:
        raise ValueError(f"few_tokens takes 1 to {MAX_TOKENS} tokens, got {x.shape[0]}")
    call = Projection.of(x, weight, bias, norm, residual, swiglu, append_to)
    target = current_target()
    columns = max(MIN_COLUMNS if target.backend == "cuda" else MIN_COLUMNS_AMD, next_power_of_2(x.shape[0]))
    launch = launch or choose_launch(weight, call.tiles, columns, target)
    stage = launch.accumulators * (launch.rows * call.tiles + columns) * launch.chunk * weight.itemsize
    per_processor = max(1, target.shared_bytes // (launch.stages * stage))  # programs, which share PREFETCH_BYTES
    prefetch_limit = PREFETCH_BYTES // (call.tiles * per_processor)
    _few_tokens_kernel[(ceil_div(call.results, launch.rows),)](
        x,
        norm,
        weight,
        *call.pointers,
        call.length,
        eps,
        x.shape[0],
        **call.dims,
        BLOCK_N=columns,
        BLOCK_ROWS=launch.rows,
        BLOCK_IN=launch.chunk,
        ACCUMULATORS=launch.accumulators,
        PREFETCH=prefetch_bytes(weight.shape[1] * weight.itemsize, prefetch_limit, launch.rows),
        RESIDENT=per_processor * target.processors,
        num_stages=launch.stages,
        num_warps=launch.warps,
        **dependent_launch(),
    )
    return call.y
