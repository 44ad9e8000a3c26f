"""RMSNorm of many tokens (Zhang and Sennrich, 2019, as Llama rounds it).

    y = round(x / sqrt(mean(x²) + eps)) · weight          float32 statistics, rounded before the weight, as by Meta

x, y (N, E), weight (E,). Moves 2·N·E elements for about 4·N·E flops: bound by memory. Each program holds one row in
registers, so that it is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.checks import check_model_dtype, check_tensor
from fastllama.kernels.launch.sizes import next_power_of_2
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD

MAX_WIDTH = 65536
ELEMENTS_PER_THREAD = 16  # two 16-byte loads of bfloat16
THREADS_PER_WARP = 32
MAX_WARPS = 16


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, eps, E: tl.constexpr, BLOCK_E: tl.constexpr):
    cols = tl.arange(0, BLOCK_E)
    live = cols < E
    begin = tl.program_id(0).to(tl.int64) * E
    x = tl.load(x_ptr + begin + cols, mask=live, other=0.0)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / E + eps)).to(x.dtype)
    tl.store(y_ptr + begin + cols, normed * tl.load(weight_ptr + cols, mask=live, other=0.0), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize rows: x (N, E), weight (E,) -> (N, E).

    Raises ValueError if tensors do not match, and for rows of more than 65,536 elements.
    """
    check_model_dtype("x", x)
    check_tensor("x", x, ("N", "E"), x.dtype, x.device)
    n_tokens, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(f"rms_norm takes rows of up to {MAX_WIDTH} elements, got {width}")
    check_tensor("weight", weight, (width,), x.dtype, x.device)
    y = torch.empty_like(x)
    block = next_power_of_2(width)
    if n_tokens:
        _rms_norm_kernel[(n_tokens,)](
            x, weight, y, eps, E=width, BLOCK_E=block, num_warps=warps_for(block), **FUSED_MULTIPLY_ADD
        )
    return y


def warps_for(block: int) -> int:
    """Warps of a program that holds a row of `block` elements, a power of two, in registers."""
    return min(max(block // (ELEMENTS_PER_THREAD * THREADS_PER_WARP), 1), MAX_WARPS)
