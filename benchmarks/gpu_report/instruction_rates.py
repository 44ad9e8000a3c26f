"""A section of a GPU report: how many of each instruction a multiprocessor executes per clock.

The number of instructions per weight is known from the compiled kernels; how fast they are has to be timed. An H200
reads about 17 bytes per clock and multiprocessor (4.5 TB/s, 132 of them at 1.98 GHz), which is 17 weights of 8 bits or
34 of 4 bits. What follows:

    dp4a                  four products, and two for each weight as x has two byte planes: 9 a clock for int8, 17 for
                          int4. At 16 or fewer it cannot keep up with int4; at 64, half of fma, it takes a quarter of
                          the time, and one token of int4 needs neither conversions nor the matrix units
    cvt.rn.f32.s8         `conversions.py` gives it half of int8's bytes, 9 a clock, because 16 are assumed. At 32 or
                          more it can take all, without prmt and cvt.rn.f32.s32
    cvt.f32.f16           one for each weight: 17 a clock for fp8, 34 for int4
    cvt.rn.f16x2.e4m3x2   two weights at once: 9 a clock. For compute capability 12.0 the compiler adds permutations

The ratio to fma compares two times of one run, so it does not depend on the clock. The number per clock is from the
multiprocessors' own counters.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.benchmarks.gpu_report.measurements import Bench, Results
from fastllama.benchmarks.statistics import GIGA, MICRO
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD, current_target
from fastllama.kernels.projection.packing import uses_assembly
from fastllama.quantization import converts_fp8

FMA = "fma.rn.f32"
# $1 becomes $0, which the next instruction takes; $2 is a number that the compiler does not know. So none can be left
# out, moved or combined with another.
ASSEMBLY = {
    FMA: "fma.rn.f32 $0, $1, $2, $2;",
    "dp4a.s32.s32": "dp4a.s32.s32 $0, $1, $2, $1;",
    "dp4a.u32.s32": "dp4a.u32.s32 $0, $1, $2, $1;",
    "cvt.rn.f32.s8": "cvt.rn.f32.s8 $0, $1;",
    "cvt.rn.f32.s32": "cvt.rn.f32.s32 $0, $1;",
    "cvt.f32.f16": "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, b; }",
    "cvt.rn.f16x2.e4m3x2": "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 $0, a; }",
    "prmt": "prmt.b32 $0, $1, $2, $2;",
}
OTHER = 0x3F002301  # $2: as float32 0.5, with which fma's chains stay near 1; prmt swaps neighbouring bytes by it
WARPS = 32  # of a program, one for each multiprocessor
CHAINS = 8  # of a thread: enough for each scheduler to have one whose last result is there
UNROLL = 32  # instructions of each chain in one iteration of the loop


@triton.jit
def _clock(ASM: tl.constexpr):
    """The multiprocessor's counter of clocks; 0 without assembly."""
    if ASM:
        return tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    else:
        return tl.program_id(0).to(tl.int64) * 0


@triton.jit
def _byte(values, at):
    """The byte that begins at bit `at`, with its sign."""
    return (values << (24 - at)) >> 24


@triton.jit
def _result(values, other, INSTRUCTION: tl.constexpr):
    """What an instruction makes of int32 values, without assembly."""
    if INSTRUCTION == "fma.rn.f32":
        factor = other.to(tl.float32, bitcast=True)
        result = (values.to(tl.float32, bitcast=True) * factor + factor).to(tl.int32, bitcast=True)
    elif INSTRUCTION == "cvt.rn.f32.s8":
        result = _byte(values, 0).to(tl.float32).to(tl.int32, bitcast=True)
    elif INSTRUCTION == "cvt.rn.f32.s32":
        result = values.to(tl.float32).to(tl.int32, bitcast=True)
    elif INSTRUCTION == "cvt.f32.f16":
        half = (values >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        result = half.to(tl.float32).to(tl.int32, bitcast=True)
    elif INSTRUCTION == "cvt.rn.f16x2.e4m3x2":  # as in `conversions.py`, but NaN becomes 480
        result = values * 0
        for byte in tl.static_range(2):
            bits = ((_byte(values, 8 * byte) << 7) & -0x4080).to(tl.int16)
            half = (bits.to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
            result |= (half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << (16 * byte)
    elif INSTRUCTION == "prmt":
        result = values * 0
        for byte in tl.static_range(4):  # each selected from the first operand, which OTHER does
            result |= ((values >> (8 * ((other >> (4 * byte)) & 3))) & 255) << (8 * byte)
    else:
        result = values
        for byte in tl.static_range(4):
            first = _byte(values, 8 * byte)
            if INSTRUCTION == "dp4a.u32.s32":
                first &= 255
            result += first * _byte(other, 8 * byte)
    return result


@triton.jit(do_not_specialize=["LOOPS"])
def _chains_kernel(
    values_ptr,
    other_ptr,
    results_ptr,
    clocks_ptr,
    LOOPS,
    INSTRUCTION: tl.constexpr,
    ASSEMBLY: tl.constexpr,  # None: without
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    values = tl.load(values_ptr + tl.arange(0, BLOCK))
    other = tl.load(other_ptr)
    tl.debug_barrier()
    begin = _clock(ASSEMBLY is not None)
    for _ in range(LOOPS):
        for _ in tl.static_range(UNROLL):
            if ASSEMBLY is not None:
                values = tl.inline_asm_elementwise(
                    ASSEMBLY, "=r,r,r", [values, other], dtype=tl.int32, is_pure=True, pack=1
                )
            else:
                values = _result(values, other, INSTRUCTION)
    tl.debug_barrier()
    tl.store(clocks_ptr + tl.program_id(0), _clock(ASSEMBLY is not None) - begin)
    tl.store(results_ptr + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), values)


def run_chains(
    instruction: str, values: Tensor, other: Tensor, loops: int, *, unroll: int = UNROLL, plain: bool = False
) -> tuple[Tensor, Tensor]:
    """Execute an instruction loops · unroll times, each time on its last results, on every multiprocessor.

    values: int32, CHAINS for each of a program's threads. other: int32 (1,). plain: without assembly. Returns the
    results and the clocks of each program; without assembly these are 0.
    """
    target = current_target()
    programs, block = target.processors, values.numel()
    results = torch.empty(programs, block, dtype=torch.int32, device=values.device)
    clocks = torch.empty(programs, dtype=torch.int64, device=values.device)
    _chains_kernel[(programs,)](
        values,
        other,
        results,
        clocks,
        loops,
        INSTRUCTION=instruction,
        ASSEMBLY=ASSEMBLY[instruction] if uses_assembly(target) and not plain else None,
        BLOCK=block,
        UNROLL=unroll,
        num_warps=WARPS,
        **FUSED_MULTIPLY_ADD,
    )
    return results, clocks


def instruction_rates(bench: Bench) -> Results:
    """Times each instruction, fma first. Without assembly, which a rehearsal cannot use, nothing per clock is known."""
    device, loops = bench.device, bench.sizes.instruction_loops
    if device.type == "cuda" and not uses_assembly(current_target()):
        yield {"not_run": "these are NVIDIA's instructions"}
        return
    count = CHAINS * WARPS * current_target().warp_size * UNROLL * loops  # of a program
    values = (1 + torch.rand(count // (UNROLL * loops), device=device)).view(torch.int32)
    other = torch.tensor([OTHER], dtype=torch.int32, device=device)
    fma: float | None = None
    for instruction in ASSEMBLY:
        if "e4m3" in instruction and not converts_fp8(device):
            continue
        microseconds = bench.microseconds([partial(run_chains, instruction, values, other, loops)])
        clocks = run_chains(instruction, values, other, loops)[1].double().median().item()
        fma = fma or microseconds
        yield {
            "case": instruction,
            "microseconds": microseconds,
            "per_clock": count / clocks if clocks else None,
            "ratio_to_fma": fma / microseconds,  # of the rates
            "giga_per_second": count / microseconds * MICRO / GIGA,  # of a multiprocessor
            "clock_mhz": clocks / microseconds if clocks else None,
        }
