"""Programmatic dependent launch: a kernel begins while the one before it ends, and waits where it must.

At a boundary between two kernels a GPU idles: the last programs of one end, the next is launched, its first loads are
on their way. From compute capability 9.0 on, a kernel may be launched as dependent on the one before: its programs
begin as soon as there is room for them, do what needs nothing of that one, wait until it has completed and its results
are visible, and go on. What needs nothing of it is most of the work here: the weights are immutable. A program requests
the weights that it holds in registers, and has those that others will want brought to L2, before it waits.

The rule that makes this safe: every program of such a kernel waits exactly once, before any branch, loop or return.
Before that it only loads immutable weights and prefetches; every read of what another kernel writes, and every write,
comes after. What lets the next kernel begin follows soon, behind loads at the most. Then at the wait not only the
kernel before is complete, but everything earlier in the stream: it waited, too. So buffers can be used again and again,
and a kernel that is launched as usual, torch's own, may stand anywhere in between. So may a collective's: it is
complete at the wait, or, where it has a stream of its own, before the launch, by the event that the stream waits for.
`benchmarks/kernels_report/dependence.py` proves the rule from the compiler's IR. Weights that a launch changes must
have a launch that only waits, `embed` in the model, between it and whoever reads them.

A prefetch may be steered by a number that is not final, as long as every value of it leads to an address inside the
tensor: a prefetch changes nothing that can be seen.

NVIDIA, CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol` and
`cp.async.bulk.prefetch`.
"""

import triton
import triton.language as tl

from fastllama.kernels.launch.interpreter import interpreting
from fastllama.kernels.launch.options import switches
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD, current_target

MIN_ARCH = 90  # compute capability times ten
PREFETCH_BYTES = 131072  # a multiprocessor: what memory delivers in the few microseconds of a wait
ALIGNMENT = 16  # bytes of a prefetch's address and size


def is_dependent() -> bool:
    """Whether kernels are launched as dependent on the one before."""
    if interpreting() or not switches().launch:
        return False
    target = current_target()
    return target.backend == "cuda" and int(target.arch) >= MIN_ARCH


def dependent_launch() -> dict[str, bool]:
    """A launch's keywords: triton's own, where the target knows it, and the kernel's DEPENDENT."""
    if is_dependent():
        return FUSED_MULTIPLY_ADD | {"DEPENDENT": True, "launch_pdl": True}
    return FUSED_MULTIPLY_ADD | {"DEPENDENT": False}


def prefetch_bytes(row_bytes: int, most: int, rows: int = 1) -> int:
    """How much of a block of rows of row_bytes each a program brings to L2 before it waits: up to `most` bytes.

    0 for nothing: where launches do not depend, or rows begin where a prefetch cannot.
    """
    if not (is_dependent() and switches().prefetch) or row_bytes % ALIGNMENT:
        return 0
    return min(rows * row_bytes, most // ALIGNMENT * ALIGNMENT)


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Wait for all that came before in the stream, and let the next kernel begin."""
    wait(DEPENDENT)
    let_next_begin(DEPENDENT)


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Wait for all that came before in the stream."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(DEPENDENT: tl.constexpr):
    """Let the next kernel begin: soon after the wait, with nothing in between but loads."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_block(ptr, wanted, n_bytes):
    """Have n_bytes that lie side by side brought to L2, by one instruction of one thread, where `wanted` is 1, not 0.

    A warp issues such instructions of its threads one after the other, 40 to 60 cycles each: a block is best had whole.
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
