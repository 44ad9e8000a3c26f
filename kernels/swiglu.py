"""SwiGLU of many tokens, after the library's projection (Shazeer, 2020, as Llama rounds it).

    y[n, f] = round(SiLU(x[n, f])) · x[n, F + f]          SiLU in float32

x (N, 2F), gate and up side by side; y (N, F). Moves 3·N·F elements: bound by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.checks import check_model_dtype, check_tensor
from fastllama.kernels.launch.sizes import ceil_div
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD

BLOCK_F = 1024  # eight elements (a 16-byte load) of each part per thread of 128


@triton.jit
def silu_times(gate, up):
    """SiLU(gate) · up; both results are rounded to the model dtype."""
    x = gate.to(tl.float32)
    return (x / (1.0 + tl.exp(-x))).to(gate.dtype) * up


@triton.jit
def _silu_mul_kernel(x_ptr, y_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    live = cols < F
    token = tl.program_id(0).to(tl.int64)
    gate = tl.load(x_ptr + token * 2 * F + cols, mask=live, other=0.0)
    up = tl.load(x_ptr + token * 2 * F + F + cols, mask=live, other=0.0)
    tl.store(y_ptr + token * F + cols, silu_times(gate, up), mask=live)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) · up: gate_up (N, 2F) -> (N, F). Raises ValueError for an odd width and for strided input."""
    check_model_dtype("gate_up", gate_up)
    check_tensor("gate_up", gate_up, ("N", "2·F"), gate_up.dtype, gate_up.device)
    n_tokens, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up must have shape (N, 2·F), got {tuple(gate_up.shape)}")
    y = torch.empty(n_tokens, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        _silu_mul_kernel[(n_tokens, ceil_div(width // 2, BLOCK_F))](
            gate_up, y, F=width // 2, BLOCK_F=BLOCK_F, num_warps=4, **FUSED_MULTIPLY_ADD
        )
    return y
