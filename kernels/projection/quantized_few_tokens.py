"""A projection of 2 to 16 tokens with a quantised weight, on the matrix units: `few_tokens.py`'s computation.

The weight's bytes come through the same pipeline of asynchronous copies and become x's dtype in registers, exactly.
There x is put in the order of the weight's bytes (`packing.py`). Scales per row multiply finished sums. Scales of
groups multiply the product of a group, whose sums do not wait for those of other groups. int4's offsets multiply the
group's sum of x, which is a product with ones on the matrix units: it is then in the threads that need it.

Warps do not share out rows but columns: each multiplies a chunk of its own by all rows of the tile, as one of a batch
of products, and the warps' sums are added at the end. A conversion takes several instructions per weight, so even 16
rows need the schedulers of all four warps, and x and its sums are computed for a chunk by one warp only.

Instructions per weight in loops for 8B, at 8 and 16 columns, and GB/s at which those at 8 fill an H200's issue slots:

    format                 qkv         output      gate+up     down        GB/s
    int8, fp8              3.7, 4.6    3.4, 3.4    3.1, 3.7    3.4, 3.4    9,100 to 10,700
    int4, groups of 128    3.3, 4.8    3.2, 3.6    2.8, 3.8    3.2, 3.7    5,000 to 6,000
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.dependent import PREFETCH_BYTES, dependent_launch, prefetch_bytes, wait_for_inputs
from fastllama.kernels.launch.sizes import ceil_div, next_power_of_2
from fastllama.kernels.launch.target import current_target
from fastllama.kernels.projection.arguments import Projection
from fastllama.kernels.projection.conversions import bytes_as, nibbles_as, ones_like, scale_and_offset
from fastllama.kernels.projection.epilogues import prefetch_tiles, store_tokens, weight_rows
from fastllama.kernels.projection.few_tokens import (
    MAX_TOKENS,
    MIN_COLUMNS,
    MIN_COLUMNS_AMD,
    load_tile,
    sum_accumulators,
)
from fastllama.kernels.projection.packing import FusedWeight, uses_assembly, weight_dims
from fastllama.kernels.projection.quantized_launch import Launch, choose_launch
from fastllama.kernels.rope import CacheTarget


@triton.jit
def _load_x(x_ptr, norm_ptr, tokens, begin, token_exists, squares, IN: tl.constexpr, BYTES: tl.constexpr, B, EVEN):
    """x of BYTES columns from each of `begin` (SPLIT,) on, times the norm's weight if there is one, as (SPLIT, BYTES,
    BLOCK_N) in the order of the weight's bytes; and the sums of squares of x so far."""
    cols = begin[:, None, None] + tl.arange(0, BYTES)[None, None, :]
    inside = cols < IN
    mask = token_exists[None, :, None] if EVEN else inside & token_exists[None, :, None]
    x = tl.load(x_ptr + tokens[None, :, None] * IN + cols, mask=mask, other=0.0)
    if norm_ptr is not None:
        wide = x.to(tl.float32)
        squares += wide * wide
        x = x * load_tile(norm_ptr + cols, inside, EVEN)
    blocks = tl.reshape(x, (x.shape[0], x.shape[1], BYTES // (8 * B), 2, B, 4))
    ordered = tl.reshape(tl.permute(blocks, (0, 1, 2, 4, 3, 5)), (x.shape[0], x.shape[1], BYTES))
    return tl.permute(ordered, (0, 2, 1)), squares


@triton.jit
def _ordered_x(x_ptr, norm_ptr, weight, tokens, begin, token_exists, squares, IN, BYTES, B, FORMAT, ASM, EVEN):
    """x of the chunks, of int4 that of the bytes' low and high halves; the sums of both; and the squares so far.

    Only int4 needs the sums, (SPLIT, BLOCK_ROWS, BLOCK_N) with equal rows.
    """
    x, squares = _load_x(x_ptr, norm_ptr, tokens, begin, token_exists, squares, IN, BYTES, B, EVEN)
    if FORMAT == "int4":
        high, squares = _load_x(x_ptr, norm_ptr, tokens, begin + BYTES, token_exists, squares, IN, BYTES, B, EVEN)
        ones = ones_like(weight, x.dtype, ASM)
        sums = tl.dot(ones, x, input_precision="ieee"), tl.dot(ones, high, input_precision="ieee")
        return (x, high), sums, squares
    else:
        return (x,), (), squares


@triton.jit
def _add_products(
    sums, weight, scales_ptr, rows, group, exists, x, sum_x, FORMAT, GROUPS, SCALE_DTYPE, HAS_ZEROS, ASM, EVEN
):
    """sums plus the products of the chunks' bytes with x; of groups, scaled."""
    if GROUPS == 0:
        return tl.dot(bytes_as(weight, x[0].dtype, FORMAT, ASM), x[0], sums, input_precision="ieee")
    elif FORMAT == "int4":
        scales = load_tile(scales_ptr + rows[None, :] * GROUPS + group[:, None], exists, EVEN)
        low, high = nibbles_as(weight, x[0].dtype, ASM)
        scale, offset = scale_and_offset(scales, SCALE_DTYPE, HAS_ZEROS)
        # Each of the four products is scaled alone: one that began with another's sums would wait for them.
        product = scale[:, :, None] * tl.dot(low, x[0], input_precision="ieee") + offset[:, :, None] * sum_x[0]
        product += scale[:, :, None] * tl.dot(high, x[1], input_precision="ieee") + offset[:, :, None] * sum_x[1]
        return sums + product
    else:
        scales = load_tile(scales_ptr + rows[None, :] * GROUPS + group[:, None], exists, EVEN)
        product = tl.dot(bytes_as(weight, x[0].dtype, FORMAT, ASM), x[0], input_precision="ieee")
        return sums + scales.to(tl.float32)[:, :, None] * product


@triton.jit
def _scaled_by_row(total, scales_ptr, rows, exists):
    """Sums (BLOCK_ROWS, BLOCK_N) times the scale of each row."""
    return total * tl.load(scales_ptr + rows, mask=exists, other=0.0)[:, None]


# fmt: off
@triton.jit
def _multiply(
    x_ptr, norm_ptr, weight_ptr, scales_ptr, first, second, tokens, exists, token_exists, eps,
    IN: tl.constexpr, ROW_BYTES: tl.constexpr, TWO_TILES: tl.constexpr, EVEN: tl.constexpr,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, SCALE_DTYPE: tl.constexpr,
    HAS_ZEROS: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BYTES: tl.constexpr, UNROLL: tl.constexpr, SPLIT: tl.constexpr,
):
    """Rows `first`, and with TWO_TILES `second`, of the weight, times norm(x)ᵀ -> two tiles (BLOCK_ROWS, BLOCK_N)."""
    RUNS: tl.constexpr = 4 if FORMAT == "int4" else 2
    B: tl.constexpr = BLOCK // (4 * RUNS)
    chunks = tl.arange(0, SPLIT) * BYTES
    byte = chunks[:, None, None] + tl.arange(0, BYTES)[None, None, :]
    weight_at = weight_ptr + first[None, :, None].to(tl.int64) * ROW_BYTES + byte
    weight_2_at = weight_ptr + second[None, :, None].to(tl.int64) * ROW_BYTES + byte
    squares = tl.zeros((SPLIT, BLOCK_N, BYTES), tl.float32)
    sums = (tl.zeros((SPLIT, BLOCK_ROWS, BLOCK_N), tl.float32),) * UNROLL
    sums_2 = sums
    for step in range(0, ROW_BYTES, UNROLL * SPLIT * BYTES):
        for i in tl.static_range(UNROLL):
            begin = step + i * SPLIT * BYTES
            live = exists[None, :, None] & (byte + begin < ROW_BYTES)
            weight = load_tile(weight_at + begin, live, EVEN)
            if TWO_TILES:
                weight_2 = load_tile(weight_2_at + begin, live, EVEN)
            chunk = chunks + begin
            live_scales, group = exists[None, :] & (chunk < ROW_BYTES)[:, None], chunk // BYTES
            x, sum_x, squares = _ordered_x(x_ptr, norm_ptr, weight, tokens, chunk * (RUNS // 2), token_exists, squares,
                                           IN, BYTES, B, FORMAT, ASM, EVEN)
            # Each chunk uses the accumulator whose last sums are oldest.
            sums = sums[1:] + (_add_products(sums[0], weight, scales_ptr, first, group, live_scales, x, sum_x, FORMAT,
                                             GROUPS, SCALE_DTYPE, HAS_ZEROS, ASM, EVEN),)
            if TWO_TILES:
                sums_2 = sums_2[1:] + (_add_products(sums_2[0], weight_2, scales_ptr, second, group, live_scales, x,
                                                     sum_x, FORMAT, GROUPS, SCALE_DTYPE, HAS_ZEROS, ASM, EVEN),)
    total, total_2 = tl.sum(sum_accumulators(sums), 0), tl.sum(sum_accumulators(sums_2), 0)
    if GROUPS == 0:
        total = _scaled_by_row(total, scales_ptr, first, exists)
        total_2 = _scaled_by_row(total_2, scales_ptr, second, exists) if TWO_TILES else total_2
    if norm_ptr is not None:
        inverse = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / IN + eps)[None, :]
        total, total_2 = total * inverse, total_2 * inverse
    return total, total_2
# fmt: on


@triton.jit(do_not_specialize=["T", "N"], do_not_specialize_on_alignment=["positions_ptr", "rows_ptr", "pages_ptr"])
def _quantized_few_tokens_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    scales_ptr,
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
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,  # of a row; 0: a scale per row
    BLOCK: tl.constexpr,  # columns of a block of the weight's order
    ROW_BYTES: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BYTES: tl.constexpr,  # of a row per dot
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,  # chunks multiplied at once, one by each warp
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,  # bytes of each tile, from its first row on
    RESIDENT: tl.constexpr,  # programs that run at once: later ones do not wait, so they prefetch nothing
):
    TWO_TILES: tl.constexpr = EPILOGUE != "none"
    if PREFETCH > 0:
        begin_out = tl.program_id(0) * BLOCK_ROWS
        waits = (tl.program_id(0) < RESIDENT) & (begin_out + BLOCK_ROWS <= OUT)
        prefetch_tiles(weight_ptr, begin_out, waits.to(tl.int32), OUT, ROW_BYTES, EPILOGUE, PREFETCH)
    wait_for_inputs(DEPENDENT)
    FULL: tl.constexpr = ROW_BYTES * (2 if FORMAT == "int4" else 1) == IN
    EVEN: tl.constexpr = FULL and ROW_BYTES % (UNROLL * SPLIT * BYTES) == 0 and OUT % BLOCK_ROWS == 0
    out = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = tl.arange(0, BLOCK_N)
    exists, token_exists = out < OUT, tokens < N
    first, second = weight_rows(out, OUT, EPILOGUE)
    # fmt: off
    sums, sums_2 = _multiply(x_ptr, norm_ptr, weight_ptr, scales_ptr, first, second, tokens, exists, token_exists, eps,
                             IN, ROW_BYTES, TWO_TILES, EVEN, FORMAT, GROUPS, BLOCK, SCALE_DTYPE, HAS_ZEROS, ASM,
                             BLOCK_N, BLOCK_ROWS, BYTES, UNROLL, SPLIT)
    store_tokens(sums, sums_2, out, exists, tokens, token_exists, bias_ptr, residual_ptr, y_ptr, cache_k_ptr,
                 cache_v_ptr, pages_ptr, rope_ptr, positions_ptr, rows_ptr, T, OUT, H, K, D, EPILOGUE)
    # fmt: on


def quantized_few_tokens(
    x: Tensor,
    weight: FusedWeight,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    swiglu: bool = False,
    append_to: CacheTarget | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Project x (N, IN), 1 to 16 tokens, by a packed weight, in one launch -> (N, OUT).

    The arguments and the errors are those of `few_tokens`.
    """
    if not 1 <= x.shape[0] <= MAX_TOKENS:
        raise ValueError(f"few_tokens takes 1 to {MAX_TOKENS} tokens, got {x.shape[0]}")
    call = Projection.of(x, weight, bias, norm, residual, swiglu, append_to)
    target = current_target()
    columns = max(MIN_COLUMNS if target.backend == "cuda" else MIN_COLUMNS_AMD, next_power_of_2(x.shape[0]))
    launch = launch or choose_launch(weight, call.tiles, columns, x.itemsize, target)
    row_bytes, asm = weight.values.shape[1], uses_assembly(target)
    x_bytes = columns * (x.shape[1] * x.itemsize // row_bytes)  # for each byte of a row
    stage = launch.unroll * launch.warps * launch.chunk * (launch.rows * call.tiles + x_bytes)
    per_processor = max(1, target.shared_bytes // (launch.stages * stage))  # programs, which share PREFETCH_BYTES
    prefetch_limit = PREFETCH_BYTES // (call.tiles * per_processor)
    _quantized_few_tokens_kernel[(ceil_div(call.results, launch.rows),)](
        x,
        norm,
        weight.values.view(torch.int8) if weight.format == "int8" else weight.values,
        weight.scales,
        *call.pointers,
        call.length,
        eps,
        x.shape[0],
        **call.dims,
        **weight_dims(weight),
        ROW_BYTES=row_bytes,
        ASM=asm,
        BLOCK_N=columns,
        BLOCK_ROWS=launch.rows,
        BYTES=launch.chunk,
        UNROLL=launch.unroll,
        SPLIT=launch.warps,
        PREFETCH=prefetch_bytes(row_bytes, prefetch_limit, launch.rows),
        RESIDENT=per_processor * target.processors,
        num_stages=launch.stages,
        num_warps=launch.warps,
        **dependent_launch(),
    )
    return call.y
