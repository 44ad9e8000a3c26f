"""Programmatic dependent launch: a kernel starts while the previous one runs, and waits before it reads inputs.

Between two kernels a GPU idles: the last programs of one finish, the next is launched, its first loads are in flight.
From compute capability 9.0 on, a kernel may be launched as dependent on the previous one. Its programs start as soon as
resources are free, do work that does not need the previous kernel, wait until that kernel has completed and its results
are visible, and continue. Most of this work is loading weights, which no kernel changes. Before it waits, a program
loads the weights that it holds in registers, and prefetches to L2 those that other programs will read.

The rule that makes this safe: every program of such a kernel waits exactly once, before any branch, loop or return.
Before the wait it only loads immutable weights and prefetches. Every read of data that another kernel writes, and every
write, comes after. The trigger that lets the next kernel start follows the wait, with nothing but loads between. So at
the wait everything earlier in the stream is complete, because the previous kernel waited, too. Buffers can therefore be
reused, and ordinary kernels, such as torch's, may come in between. So may a collective's: it is complete at the wait,
or, if it runs on another stream, before the launch, by the event that this stream waits for. If a launch changes
weights, a launch that only waits (in the model: `embed`) must come before the next kernel that reads them.
`benchmarks/kernels_report/dependence.py` proves the rule from the compiler's IR.

A prefetch address may depend on a value that may still change, if every value leads to an address inside the tensor: a
prefetch has no visible effect.

NVIDIA, CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol` and
`cp.async.bulk.prefetch`.
"""

import triton
import triton.language as tl

from fastllama.kernels.launch.interpreter import interpreting
from fastllama.kernels.launch.options import launch_options
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD, current_target

MIN_ARCH = 90  # compute capability times ten
PREFETCH_BYTES = 131072  # per multiprocessor: what memory delivers during the few microseconds of a wait
ALIGNMENT = 16  # in bytes, of a prefetch's address and size


def is_dependent() -> bool:
    """True if kernels are launched as dependent on the previous one, with the current device and options."""
    if interpreting() or not launch_options().dependent:
        return False
    target = current_target()
    return target.backend == "cuda" and int(target.arch) >= MIN_ARCH


def dependent_launch() -> dict[str, bool]:
    """Keyword arguments of a launch: Triton's `launch_pdl` if it applies, and the kernel's DEPENDENT."""
    if is_dependent():
        return FUSED_MULTIPLY_ADD | {"DEPENDENT": True, "launch_pdl": True}
    return FUSED_MULTIPLY_ADD | {"DEPENDENT": False}


def prefetch_bytes(row_bytes: int, max_bytes: int, rows: int = 1) -> int:
    """How many bytes of a block of rows a program prefetches to L2 before it waits: at most max_bytes.

    0, for no prefetch, without dependent launch, and if row_bytes is not a multiple of the alignment.
    """
    if not (is_dependent() and launch_options().prefetch) or row_bytes % ALIGNMENT:
        return 0
    return min(rows * row_bytes, max_bytes // ALIGNMENT * ALIGNMENT)


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Wait for all earlier work of the stream, then let the next kernel start."""
    grid_dependency_wait(DEPENDENT)
    launch_dependents(DEPENDENT)


@triton.jit
def grid_dependency_wait(DEPENDENT: tl.constexpr):
    """Wait for all earlier work of the stream (PTX griddepcontrol.wait)."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_dependents(DEPENDENT: tl.constexpr):
    """Let the next kernel start (PTX griddepcontrol.launch_dependents). Only loads may separate it from the wait."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_block(ptr, wanted, n_bytes):
    """Prefetch n_bytes from ptr on to L2, by one instruction of one thread, if `wanted` is 1. Do nothing if it is 0.

    A warp issues such instructions of its threads one after another, 40 to 60 cycles each. So one large prefetch is
    best.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred mine;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.lt.s32 mine, thread, $2;
        @mine cp.async.bulk.prefetch.L2.global [$1], $3;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [ptr, wanted, n_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
