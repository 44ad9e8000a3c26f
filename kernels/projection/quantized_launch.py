"""How `quantized_few_tokens.py` assigns a weight to programs."""

from functools import cache
from typing import NamedTuple

from fastllama.kernels.launch.sizes import next_power_of_2
from fastllama.kernels.launch.target import Target
from fastllama.kernels.projection.few_tokens import (
    BYTES_IN_FLIGHT,
    MIN_COLUMNS,
    ROWS_PER_WARP,
    SHARED_BYTES_SPARE,
    STAGES,
    choose_rows,
)
from fastllama.kernels.projection.packing import ROW_BLOCK, FusedWeight

CHUNK_BYTES = 128  # of a row with one scale, per dot at 8 columns; of groups it is a group
MIN_STAGE_BYTES = 8192  # so that programs rarely wait for a stage
MAX_UNROLL = 8
WARP_BYTES = 512  # of a warp's copies, 16 for each thread
MAX_WARPS = 2  # four would use instructions that read x's copies in another order, and copy the weight narrowly


class Launch(NamedTuple):
    """How a weight is assigned to programs."""

    rows: int  # per tile
    chunk: int  # bytes of a row per dot, of int4 two dots
    unroll: int  # chunks per stage
    stages: int
    warps: int


def choose_launch(weight: FusedWeight, tiles: int, columns: int, itemsize: int, target: Target) -> Launch:
    """Tile sizes and launch options: `tiles` tiles of rows per program, tokens padded to `columns`, x of `itemsize`.

    weight (OUT × IN)            int8, fp8 at 8, 16 columns:          int4 in groups of 128:
                                 rows      bytes      chunks   stages      rows      chunks   stages
    8B   qkv      6144 ×  4096   16        128, 64    2        8           16        4, 1     8
    8B   output   4096 ×  4096   16, 32    128, 64    4        6, 8        16, 32    8, 4     4, 8
    8B   gate+up 28672 ×  4096   64        128, 64    1, 2     4, 7        64, 32    1        7, 8
    8B   down     4096 × 14336   16, 32    128, 64    4        6, 8        16, 32    8, 4     4, 8
    8B   head   128256 ×  4096   64        128, 64    1, 2     4           int8
    """
    rows, row_bytes = weight.values.shape
    return _launch_of(rows // tiles, row_bytes, weight.format, weight.group, tiles, columns, itemsize, target)


@cache
def _launch_of(
    results: int, row_bytes: int, kind: str, group: int, tiles: int, columns: int, itemsize: int, target: Target
) -> Launch:
    per_byte = 2 if kind == "int4" else 1
    chunk = (
        group // per_byte
        if group
        else max(ROW_BLOCK, min(CHUNK_BYTES * MIN_COLUMNS // columns, next_power_of_2(row_bytes)))
    )
    if itemsize == 4:  # no matrix instructions: as few_tokens' launch for float32
        return Launch(16, chunk if group else ROW_BLOCK, 1, 2, 4)
    rows, most_unrolled = choose_rows(results, tiles, columns, target.processors), MAX_UNROLL
    if tiles * columns > 2 * MIN_COLUMNS:  # more sums than registers
        rows, most_unrolled = (min(rows, 2 * ROWS_PER_WARP), 1) if kind == "int4" else (rows, 2)
    if chunk < ROWS_PER_WARP * 2:  # so that a thread's copy has 16 bytes, and the compiler is done soon
        rows, most_unrolled = max(rows, 2 * ROWS_PER_WARP), min(most_unrolled, 2 * MIN_COLUMNS // columns)
    unroll = 1
    while (
        unroll < most_unrolled
        and rows * tiles * chunk * unroll < MIN_STAGE_BYTES
        and row_bytes % (2 * unroll * chunk) == 0
    ):
        unroll *= 2
    stage = rows * tiles * chunk * unroll
    resident = max(1, min(4, round(results / (rows * target.processors))))
    fewest, most = STAGES
    stages = min(max(BYTES_IN_FLIGHT // (stage * resident) + 1, fewest), most)
    stage += columns * chunk * per_byte * unroll * itemsize
    for at_least, programs in ((fewest, min(resident, 2)), (1, 1)):
        while stages > at_least and programs * (stages * stage + SHARED_BYTES_SPARE) > target.shared_bytes:
            stages -= 1
    warps = min(rows // ROWS_PER_WARP, MAX_WARPS, max(1, rows * chunk // WARP_BYTES))
    return Launch(rows, chunk, unroll, stages, warps)
