"""Figures of how a projection reads its weight on an H200, from its instructions: early requests, possible delays."""

from typing import Any

from fastllama.benchmarks.kernels_report.ahead_of_time import Launch
from fastllama.benchmarks.kernels_report.compiled_kernel import LOAD_BYTES, Compiled
from fastllama.kernels.projection.packing import WORD_BYTES

READ_BYTES_PER_US = 4.5e6  # the read bandwidth of published microbenchmarks
CLOCKS_PER_US = 1980
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction per clock
MATRIX_ROWS, MATRIX_COLUMNS, MATRIX_DEPTH = 16, 8, 16  # of a matrix instruction of one warp
GROUP_ROWS = 64  # of a matrix instruction of four warps, which covers all columns

Row = dict[str, Any]


def streaming_metrics(launch: Launch, compiled: Compiled, programs: int) -> Row:
    """A launch's figures, ready for JSON.

    in_flight: bytes of the weight that a multiprocessor has requested before a program waits. share: programs per
    multiprocessor. issue: the share of the issue slots used, of kernels without a loop. microseconds: the time to read
    the weight. prefetches: issued by one warp, one after the other, in each of the first `prefetching` programs.
    chain: the least cycles of a stage's matrix instructions. budget: cycles to read a stage at the full rate.
    """
    arguments = launch.arguments
    weight = arguments["weight_ptr"]
    microseconds = weight.nbytes / READ_BYTES_PER_US
    row: Row = {
        "weight": [weight.shape[0], arguments["IN"]],
        "share": programs / compiled.gpu.processors,
        "microseconds": microseconds,
        "prefetching": min(programs, arguments["RESIDENT"]),
        "prefetches": _prefetches(arguments, compiled),
        "looped_prefetches": compiled.sass.prefetches()[1],
        "issue": None,
    }
    if launch.kernel.endswith("matvec_kernel"):
        slots = microseconds * SCHEDULERS * CLOCKS_PER_US * compiled.gpu.processors
        of_program = compiled.early_weight_bytes * compiled.threads
        row["issue"] = len(compiled.instructions) * compiled.warps * programs / slots
        row |= _order(arguments, compiled)
    else:  # a pipelined loop: all stages but the one in use are in flight
        stage = _tile_rows(arguments) * _stage_columns(arguments) * weight.nbytes // _elements(arguments)
        of_program = (compiled.stages - 1) * stage
        row |= {"chain": _chain(arguments, compiled), "budget": _budget(stage, row["share"], compiled)}
    return row | {"in_flight": of_program * compiled.programs_per_processor}


def _tile_rows(arguments: Row) -> int:
    """Rows of the weight per program."""
    rows: int = arguments["BLOCK_ROWS"] * (1 if arguments["EPILOGUE"] == "none" else 2)
    return rows


def _per_word(arguments: Row) -> int:
    """Weights in a word of 64 bits of a quantised weight."""
    return 16 if arguments["FORMAT"] == "int4" else 8


def _elements(arguments: Row) -> int:
    """Numbers of a weight, without padding."""
    rows: int = arguments["OUT"] * (1 if arguments["EPILOGUE"] == "none" else 2) * arguments["IN"]
    return rows


def _stage_columns(arguments: Row) -> int:
    """Columns of the weight per stage of a pipelined loop."""
    columns: int
    if "BYTES" in arguments:
        columns = arguments["BYTES"] * arguments["UNROLL"] * arguments["SPLIT"] * _per_word(arguments) // WORD_BYTES
    else:
        columns = arguments["BLOCK_IN"] * arguments["ACCUMULATORS"]
    return columns


def _prefetches(arguments: Row, compiled: Compiled) -> float:
    """Prefetches of a warp. A loop issues one for each of the warp's rows."""
    once, looped = compiled.sass.prefetches()
    rows = arguments["BLOCK_ROWS"] * (2 if arguments["EPILOGUE"] == "rotary" else 1)
    return float(once + looped * rows / compiled.warps)


def _order(arguments: Row, compiled: Compiled) -> Row:
    """For one token: the loads of x before the first wait for a weight, and whether the norm is computed before it."""
    columns = arguments["WORDS"] * _per_word(arguments) if "WORDS" in arguments else arguments["BLOCK_IN"]
    chunks = -(-arguments["IN"] // columns)
    itemsize = arguments["x_ptr"].itemsize
    needed = chunks * -(-columns * itemsize // (compiled.threads * LOAD_BYTES))
    early, _ = compiled.sass.early_inputs()
    return {
        "x_loads": needed,
        "x_early": min(early, needed),
        "norm_first": compiled.sass.norm_is_first(),
        "holds_scales": arguments.get("HOLD_SCALES", False),
    }


def _chain(arguments: Row, compiled: Compiled) -> float:
    """The least cycles of a stage's matrix instructions, which wait for each other's sums."""
    cycles, count = compiled.sass.chain()
    split = arguments.get("SPLIT", 1)  # warps that multiply other columns of the same rows
    depth = _stage_columns(arguments) / split / MATRIX_DEPTH
    if any("HGMMA" in line for line in compiled.instructions):
        of_stage = depth * _tile_rows(arguments) / GROUP_ROWS
    else:  # warps beyond the number of tiles repeat work
        tiles = arguments["BLOCK_ROWS"] / MATRIX_ROWS * arguments["BLOCK_N"] / MATRIX_COLUMNS
        of_stage = depth * _tile_rows(arguments) / arguments["BLOCK_ROWS"] * max(1.0, tiles * split / compiled.warps)
        if arguments.get("FORMAT") == "int4":  # the same products with ones serve all rows
            of_stage += depth * arguments["BLOCK_N"] / MATRIX_COLUMNS
    return cycles * of_stage / count if count else 0.0


def _budget(stage: int, share: float, compiled: Compiled) -> float:
    """The cycles that a program has for each stage if all programs together read at the full rate."""
    bytes_per_cycle = READ_BYTES_PER_US / CLOCKS_PER_US / compiled.gpu.processors
    return stage * share / bytes_per_cycle
