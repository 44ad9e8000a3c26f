"""How `quantized_few_tokens.py` assigns a weight to programs."""

from functools import cache
from typing import NamedTuple

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

MIN_STAGE_BYTES = 16384  # so that programs rarely wait for a stage
MAX_UNROLL = 2
LITTLE_SHARED_BYTES = 131072  # of a multiprocessor: below, stages are short, and longer tiles spill registers
WARPS = 4  # of a program: few programs run at once, and a multiprocessor has four schedulers


class Launch(NamedTuple):
    """How a weight is assigned to programs."""

    rows: int  # per tile
    chunk: int  # bytes of a row that a warp multiplies at once
    unroll: int  # chunks of a warp per stage
    stages: int
    warps: int  # each has its own chunks of all rows


def choose_launch(weight: FusedWeight, tiles: int, columns: int, itemsize: int, target: Target) -> Launch:
    """Tile sizes and launch options: `tiles` tiles of rows per program, tokens padded to `columns`, x of `itemsize`.

    Four warps multiply chunks of 64 bytes, which is a group of 128 of int4. At 8, 16 columns:

    weight (OUT × IN)            rows      chunks of a warp    stages: int8, fp8    int4
    8B   qkv      6144 ×  4096   16        2                   4, 3                 3
    8B   output   4096 ×  4096   16, 32    2                   6, 7                 4
    8B   gate+up 28672 ×  4096   32        1                   3                    3
    8B   down     4096 × 14336   16, 32    2                   6, 7                 4
    8B   head   128256 ×  4096   64        1                   3                    int8
    """
    rows, row_bytes = weight.values.shape
    return _launch_of(rows // tiles, row_bytes, weight.format, weight.group, tiles, columns, itemsize, target)


@cache
def _launch_of(
    results: int, row_bytes: int, kind: str, group: int, tiles: int, columns: int, itemsize: int, target: Target
) -> Launch:
    per_byte = 2 if kind == "int4" else 1
    chunk = group // per_byte if group else ROW_BLOCK
    if itemsize == 4:  # no matrix instructions: as few_tokens' launch for float32
        return Launch(16, chunk, 1, 2, WARPS)
    rows = choose_rows(results, tiles, columns, target.processors)
    if tiles > 1:
        rows = min(rows, 2 * ROWS_PER_WARP)
    has_little_memory = target.shared_bytes < LITTLE_SHARED_BYTES
    if has_little_memory and columns > MIN_COLUMNS:
        rows = min(rows, ROWS_PER_WARP if kind == "int4" else 2 * ROWS_PER_WARP // tiles)
    small = chunk < 2 * ROWS_PER_WARP
    if small:  # a thread's copy should have 16 bytes, but two tiles have more sums than registers at 16 columns
        rows = ROWS_PER_WARP if tiles * columns > 2 * MIN_COLUMNS else 2 * ROWS_PER_WARP
    unroll, stage = 1, rows * tiles * chunk * WARPS
    most_unrolled = 1 if small or has_little_memory else MAX_UNROLL
    while unroll < most_unrolled and unroll * stage < MIN_STAGE_BYTES and row_bytes % (2 * unroll * chunk * WARPS) == 0:
        unroll *= 2
    stage *= unroll
    share = results / (rows * target.processors)
    resident = max(1, min(4, round(share)))
    fewest, most = STAGES
    stages = min(max(BYTES_IN_FLIGHT // (stage * resident) + 1, fewest), most)
    stage += columns * chunk * WARPS * per_byte * unroll * itemsize
    for at_least, programs in ((fewest, 2 if share > 1 else 1), (1, 1)):
        while stages > at_least and programs * (stages * stage + SHARED_BYTES_SPARE) > target.shared_bytes:
            stages -= 1
    return Launch(rows, chunk, unroll, stages, WARPS)
