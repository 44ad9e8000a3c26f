"""Products of more than 16 tokens: a quantised weight is dequantised to scratch memory for the library's matmul.

Such a product is bound by its flops, not by the weight's bytes: from a few hundred tokens on it takes longer than
writing and reading the scratch memory. Triton's own matmul reaches 50 to 77% of the library's rate on an H100, so one
with the conversion inside would lose more on a long prompt than it saves; between 17 and about 200 tokens it would win.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.dependent import dependent_launch, wait_for_inputs
from fastllama.kernels.launch.sizes import ceil_div, next_power_of_2
from fastllama.kernels.launch.target import current_target
from fastllama.kernels.projection.conversions import HIGH_UNIT, LOW_UNIT, decoded, scale_and_offset
from fastllama.kernels.projection.packing import FusedWeight, checked, rows_of, uses_assembly, weight_dims
from fastllama.kernels.quantized import QuantizedWeight, Weight

SCRATCH_ELEMENTS = 2**26  # at most: 128 MB of bfloat16
MAX_WORDS = 1024  # of a program
WARPS = 4


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias by the library's matmul: x (N, E), weight (rows, E), quantised or not -> (N, rows)."""
    if not isinstance(weight, QuantizedWeight):
        return F.linear(x, weight, bias)
    weight = checked(weight)
    rows, in_features = weight.shape
    step = max(1, SCRATCH_ELEMENTS // in_features)
    scratch = torch.empty(min(step, rows), in_features, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    for begin in range(0, rows, step):
        part = rows_of(weight, begin, step)
        dense = scratch[: part.shape[0]]
        dequantize(part, dense)
        y[:, begin : begin + step] = F.linear(x, dense, None if bias is None else bias[begin : begin + step])
    return y


def dequantize(weight: FusedWeight, out: Tensor) -> None:
    """Write a packed weight (OUT, IN) to `out`, computed in float32 and rounded to its dtype."""
    words, dims = weight.words, weight_dims(weight)
    block = min(MAX_WORDS, next_power_of_2(words.shape[1]))
    _dequantize_kernel[(words.shape[0], ceil_div(words.shape[1], block))](
        words,
        weight.scales,
        out,
        **dims,
        IN=weight.shape[1],
        IN_WORDS=words.shape[1],
        ASM=uses_assembly(current_target()),
        WORDS=block,
        num_warps=WARPS,
        **dependent_launch(),
    )


@triton.jit
def _dequantize_kernel(
    weight_ptr,
    scales_ptr,
    out_ptr,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IN: tl.constexpr,
    IN_WORDS: tl.constexpr,
    ASM: tl.constexpr,
    WORDS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    RUNS: tl.constexpr = 4 if FORMAT == "int4" else 2
    B: tl.constexpr = BLOCK // (4 * RUNS)
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    weights = decoded(tl.load(weight_ptr + row * IN_WORDS + word, mask=word < IN_WORDS, other=0), FORMAT, ASM)
    offset = 0.0
    if GROUPS == 0:
        scale = tl.load(scales_ptr + row)
    else:
        scales = tl.load(scales_ptr + row * GROUPS + word // B, mask=word < IN_WORDS, other=0)
        if FORMAT == "int4":
            scale, offset = scale_and_offset(scales, SCALE_DTYPE, HAS_ZEROS)
        else:
            scale = scales.to(tl.float32)
    for k in tl.static_range(4 * RUNS):
        col = 4 * (word // B * (B * RUNS) + k // 4 * B + word % B) + k % 4
        value = weights[k]
        if FORMAT == "int4" and ASM:
            value = value * (LOW_UNIT if k < 8 else HIGH_UNIT)
        tl.store(out_ptr + row * IN + col, (scale * value + offset).to(out_ptr.dtype.element_ty), mask=col < IN)
