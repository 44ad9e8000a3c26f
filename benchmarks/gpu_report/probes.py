"""Two kernels that measure a GPU and nothing else: how fast it reads, and what a boundary between launches costs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.dependent import dependent_launch, wait_for_inputs
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD

READ_BLOCK = 16384  # float16 numbers of a program, 32 KB, all requested before any is used: as a matvec's weights are
READ_WARPS = 4


@triton.jit
def _read_kernel(source_ptr, sums_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source_ptr + at, eviction_policy="evict_first")
    tl.store(sums_ptr + tl.program_id(0), tl.sum(values.to(tl.float32), 0))


@triton.jit
def _tick_kernel(count_ptr, DEPENDENT: tl.constexpr):
    wait_for_inputs(DEPENDENT)
    tl.store(count_ptr, tl.load(count_ptr) + 1)


def read(source: Tensor) -> Tensor:
    """source (n·READ_BLOCK,) -> sums (n,) float32 of each READ_BLOCK numbers: n·READ_BLOCK read for n written."""
    programs = source.numel() // READ_BLOCK
    sums = torch.empty(programs, dtype=torch.float32, device=source.device)
    _read_kernel[(programs,)](source, sums, BLOCK=READ_BLOCK, num_warps=READ_WARPS, **FUSED_MULTIPLY_ADD)
    return sums


def tick(count: Tensor) -> None:
    """Add one to count (1,) int32, in a launch that needs the one before it."""
    _tick_kernel[(1,)](count, num_warps=1, **dependent_launch())
