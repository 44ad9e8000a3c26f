"""Two kernels that only measure a GPU: how fast it reads, and what a boundary between two launches costs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.dependent import dependent_launch, wait_for_inputs
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD

READ_BLOCK = 16384  # float16 numbers per program, 32 KB, all requested before any is used: like a matvec's weights
READ_WARPS = 4


@triton.jit
def _block_sums_kernel(source_ptr, sums_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source_ptr + at, eviction_policy="evict_first")
    tl.store(sums_ptr + tl.program_id(0), tl.sum(values.to(tl.float32), 0))


@triton.jit
def _increment_kernel(count_ptr, DEPENDENT: tl.constexpr):
    wait_for_inputs(DEPENDENT)
    tl.store(count_ptr, tl.load(count_ptr) + 1)


def block_sums(source: Tensor) -> Tensor:
    """source (n·READ_BLOCK,) -> (n,) float32, the sum of each block. It reads n·READ_BLOCK numbers and writes n."""
    programs = source.numel() // READ_BLOCK
    sums = torch.empty(programs, dtype=torch.float32, device=source.device)
    _block_sums_kernel[(programs,)](source, sums, BLOCK=READ_BLOCK, num_warps=READ_WARPS, **FUSED_MULTIPLY_ADD)
    return sums


def increment(count: Tensor) -> None:
    """Add one to count (1,) int32 in one launch. The launch needs the result of the one before it."""
    _increment_kernel[(1,)](count, num_warps=1, **dependent_launch())
