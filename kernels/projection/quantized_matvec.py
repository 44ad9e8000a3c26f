"""A projection of one token with a quantised weight: `matvec.py`'s y = epilogue(weight · norm(x) + bias).

    sums = Σ q·x, in float32                     int8, fp8, int4; q exactly (`conversions.py`)
    y    = scale · sums                          a scale per row
    y    = Σ over groups: scale · sums + offset · (Σ of the group's x)
                                                 offset is int4's minimum, or -scale · zero

Half or a quarter of the bytes for as many products, so instructions can become the limit, which they are not with
bfloat16. Per weight, and GB/s at which they fill an H200's issue slots (128 · 132 · 1.98 G a second), for 8B:

    format                 qkv    output    gate+up    down    head    GB/s
    int8                   5.5    3.6       5.1        3.7     4.7     6,100 to 9,400
    fp8                    5.5    3.6       5.1        3.7     4.7     6,000 to 9,400
    int4, groups of 128    4.8    4.2       4.5        5.4     int8    3,100 to 4,000
    int4, groups of 32     4.4    3.9       4.2        5.3     int8    3,200 to 4,300

Memory delivers 4,500. So int4 with larger groups is left to `quantized_few_tokens.py` (`is_best`).

As in `matvec.py` a program owns complete rows, requests them in 16-byte loads into registers before it waits for x, and
no row is split over programs. Scales and offsets are requested with them.
"""

from functools import cache

import torch
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
from fastllama.kernels.projection.decoding import add_products, hidden, inverse_norm, load_runs, normed, run_values
from fastllama.kernels.projection.epilogues import load_bias, load_residual, prefetch_tiles, store_token, weight_rows
from fastllama.kernels.projection.matvec import (
    BYTES_PER_THREAD,
    LOAD_BYTES,
    MAX_WARPS,
    PROGRAMS_PER_PROCESSOR,
    TILE_BYTES,
    Launch,
    load_tiles,
)
from fastllama.kernels.projection.packing import RUN, WORD_BYTES, FusedWeight, uses_assembly, weight_dims
from fastllama.kernels.rope import CacheTarget

WORDS_PER_THREAD = LOAD_BYTES // WORD_BYTES  # of a row, in one load
MIN_GROUP = 32  # columns
MIN_CHUNK = 32  # words of a row: a warp's loads are 512 bytes


def choose_launch(weight: FusedWeight, tiles: int) -> Launch | None:
    """Rows per program, words of a row per load, and warps; None for rows that are too long.

    weight (OUT × IN)            int8, fp8: rows    tile     programs / 132
    8B   qkv      6144 ×  4096   4 pairs            32 KB    768 =   5.8
    8B   output   4096 ×  4096   8                  32 KB    512 =   3.9
    8B   gate+up 28672 ×  4096   4 + 4              32 KB   3584 =  27.2
    8B   down     4096 × 14336   2                  28 KB   2048 =  15.5
    8B   head   128256 ×  4096   8                  32 KB  16032 = 121.5
    """
    return _launch_of(*weight.words.shape, tiles, current_target())


def is_best(weight: FusedWeight, tiles: int, dtype: torch.dtype) -> bool:
    """Whether one token is best projected by this kernel, not by `quantized_few_tokens`.

    For int4 its instructions would be the limit. Matrix instructions need fewer, except in groups of 32 columns, for
    each of which they start anew; and they do not take float32.
    """
    is_limited = weight.format == "int4" and weight.group > MIN_GROUP and dtype != torch.float32
    return not is_limited and choose_launch(weight, tiles) is not None


@cache
def _launch_of(out_features: int, words: int, tiles: int, target: Target) -> Launch | None:
    row_bytes = words * WORD_BYTES
    rows = 1
    while (
        2 * rows * tiles * row_bytes <= TILE_BYTES
        and out_features / (2 * rows * tiles) >= PROGRAMS_PER_PROCESSOR * target.processors
    ):
        rows *= 2
    tile, warps = rows * tiles * row_bytes, 4
    while tile > warps * target.warp_size * BYTES_PER_THREAD:
        warps *= 2
    if warps > MAX_WARPS:
        return None
    most = WORDS_PER_THREAD * target.warp_size * warps
    chunk = most
    while chunk > MIN_CHUNK and words % chunk:
        chunk //= 2
    if words % chunk:  # the last chunk is masked
        chunk = max(8, min(next_power_of_2(words), most))
    while warps > 1 and rows * chunk * WORD_BYTES < warps * target.warp_size * LOAD_BYTES:
        warps //= 2
    return Launch(rows, chunk, warps)


@triton.jit
def _load_scales(scales_ptr, rows, live, WORDS: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, PAIRS):
    """The scales of rows, a tuple of tiles: (BLOCK_ROWS,) if GROUPS is 0, else one scale for each two words."""
    if GROUPS == 0:
        return (tl.load(scales_ptr + rows, mask=live, other=0.0),)
    else:
        scales = ()
        for i in tl.static_range(CHUNKS):
            group = (i * (WORDS // 2) + tl.arange(0, WORDS // 2)) // PAIRS
            at = scales_ptr + rows[:, None] * GROUPS + group[None, :]
            scales = scales + (tl.load(at, mask=live[:, None] & (group < GROUPS)[None, :], other=0),)
        return scales


@triton.jit
def _row_sums(totals, scales, GROUPS: tl.constexpr):
    """The sum of each row, times its scale if a row has one."""
    sums = tl.sum(totals, 1)
    return sums * scales[0] if GROUPS == 0 else sums


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["positions_ptr", "rows_ptr", "pages_ptr"])
def _quantized_matvec_kernel(
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
    IN: tl.constexpr,
    OUT: tl.constexpr,  # results: rows of the weight, or half as many if each result needs two rows
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    EPILOGUE: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,  # of a row; 0: a scale per row
    BLOCK: tl.constexpr,  # columns of a block of the weight's order
    IN_WORDS: tl.constexpr,  # of a row, with padding
    SCALE_DTYPE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,  # x in 8-byte runs
    BLOCK_ROWS: tl.constexpr,
    WORDS: tl.constexpr,  # of a row per load
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,  # bytes of each tile
    RESIDENT: tl.constexpr,  # programs that run at once; each prefetches for the program this many places later
):
    TWO_TILES: tl.constexpr = EPILOGUE != "none"
    EVEN: tl.constexpr = IN_WORDS % WORDS == 0 and OUT % BLOCK_ROWS == 0
    CHUNKS: tl.constexpr = (IN_WORDS + WORDS - 1) // WORDS
    RUNS: tl.constexpr = 4 if FORMAT == "int4" else 2
    PAIRS: tl.constexpr = BLOCK // (8 * RUNS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    out = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = out < OUT
    first, second = weight_rows(out, OUT, EPILOGUE)
    if not DEPENDENT:
        x = load_runs(x_ptr, IN, WORDS, BLOCK, CHUNKS, RUNS, WIDE)
    words, words_2 = load_tiles(weight_ptr, out, live, OUT, IN_WORDS, EPILOGUE, WORDS, EVEN)
    scales = _load_scales(scales_ptr, first, live, WORDS, CHUNKS, GROUPS, PAIRS)
    if TWO_TILES:
        scales_2 = _load_scales(scales_ptr, second, live, WORDS, CHUNKS, GROUPS, PAIRS)
    biases = load_bias(bias_ptr, out, live, OUT, EPILOGUE)
    if PREFETCH > 0:
        begin = (tl.program_id(0) + RESIDENT) * BLOCK_ROWS
        is_next = (tl.program_id(0) < RESIDENT) & (begin + BLOCK_ROWS <= OUT)
        prefetch_tiles(weight_ptr, begin, is_next.to(tl.int32), OUT, IN_WORDS, EPILOGUE, PREFETCH)
    grid_dependency_wait(DEPENDENT)
    if DEPENDENT:
        x = load_runs(x_ptr, IN, WORDS, BLOCK, CHUNKS, RUNS, WIDE)
    else:
        # Otherwise the compiler starts to multiply after half of the loads, and the rest waits behind it.
        tl.debug_barrier()
    launch_dependents(DEPENDENT)  # the compiler moves no use of a weight across it: x is requested first
    residuals = load_residual(residual_ptr, out, live)
    if norm_ptr is not None:
        inverse = 0.0
        # Always true, but the compiler does not know: it keeps the conversion of weights behind the branch.
        if T >= 0:
            inverse = inverse_norm(x, eps, IN, WORDS, CHUNKS, RUNS, WIDE, dtype)
        x = hidden(x, ASM and WIDE)
        # Not before the wait: the compiler lets x share a barrier with the weights, so nothing is computed before them.
        norms = load_runs(norm_ptr, IN, WORDS, BLOCK, CHUNKS, RUNS, WIDE)
    totals = tl.zeros((BLOCK_ROWS, WORDS if GROUPS == 0 else WORDS // 2), tl.float32)
    totals_2 = totals
    for i in tl.static_range(CHUNKS):
        values = run_values(x, i, RUNS, WIDE, dtype)
        if norm_ptr is not None:
            values = normed(values, run_values(norms, i, RUNS, WIDE, dtype), inverse, dtype, ASM)
        # fmt: off
        totals = add_products(totals, words[i], values, scales[i % len(scales)], FORMAT, GROUPS, SCALE_DTYPE, HAS_ZEROS,
                              ASM)
        if TWO_TILES:
            totals_2 = add_products(totals_2, words_2[i], values, scales_2[i % len(scales)], FORMAT, GROUPS,
                                    SCALE_DTYPE, HAS_ZEROS, ASM)
        # fmt: on
    sums = _row_sums(totals, scales, GROUPS)
    sums_2 = _row_sums(totals_2, scales_2, GROUPS) if TWO_TILES else sums
    # fmt: off
    store_token(sums, sums_2, biases, residuals, out, live, y_ptr, cache_k_ptr, cache_v_ptr, pages_ptr, rope_ptr,
                positions_ptr, rows_ptr, T, OUT, H, K, D, EPILOGUE)
    # fmt: on


def quantized_matvec(
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
    plain: bool = False,
) -> Tensor:
    """Project one token, x (1, IN), by a packed weight, in one launch -> (1, OUT).

    plain: convert weights without assembly, which the GPU report compares. The other arguments and the errors are
    those of `matvec`.
    """
    if x.shape[:1] != (1,):
        raise ValueError(f"matvec takes one token, x (1, IN), got {tuple(x.shape)}")
    call = Projection.of(x, weight, bias, norm, residual, swiglu, append_to)
    launch = launch or choose_launch(weight, call.tiles)
    if launch is None:
        raise ValueError(f"rows of {weight.shape[1]} {weight.format} weights are too long for matvec")
    target, words = current_target(), weight.words
    row_bytes = words.shape[1] * WORD_BYTES
    resident = max(1, PREFETCH_BYTES // (launch.rows * call.tiles * row_bytes)) * target.processors
    _quantized_matvec_kernel[(ceil_div(call.results, launch.rows),)](
        x,
        norm,
        words,
        weight.scales,
        *call.pointers,
        call.length,
        eps,
        **call.dims,
        **weight_dims(weight),
        IN_WORDS=words.shape[1],
        ASM=uses_assembly(target) and not plain,
        WIDE=x.itemsize == 2 and x.shape[1] % RUN == 0,
        BLOCK_ROWS=launch.rows,
        WORDS=launch.chunk,
        PREFETCH=prefetch_bytes(row_bytes, launch.rows * row_bytes, launch.rows),
        RESIDENT=resident,
        num_warps=launch.warps,
        **dependent_launch(),
    )
    return call.y
