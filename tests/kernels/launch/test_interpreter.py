"""The patched interpreter computes in bfloat16 as torch does, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.cases import random
from tests.kernels.guards import GuardedMemory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")

N = 64


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, wide_ptr, below_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(sum_ptr + at, a + b)
    tl.store(product_ptr + at, a * b)
    tl.store(wide_ptr + at, (a.to(tl.float32) / 3).to(tl.bfloat16))
    tl.store(below_ptr + at, a < b)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, rows, BLOCK):
        a, b = tl.load(a_ptr + i * rows + begin + j), tl.load(b_ptr + (begin + i) * BLOCK + j)
        total = tl.dot(a, b, total)
    tl.store(y_ptr + i * BLOCK + j, total.to(tl.bfloat16))


def test_bfloat16_arithmetic_rounds_as_torch_does(guarded: GuardedMemory) -> None:
    a, b = (random(N, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    a[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.3e38])
    outputs = [guarded.empty(N, dtype=torch.bfloat16) for _ in range(3)]
    below = guarded.empty(N, dtype=torch.bool)
    _arithmetic_kernel[(1,)](a, b, *outputs, below, BLOCK=N)
    expected: list[Tensor] = [a + b, a * b, (a.float() / 3).bfloat16()]
    for ours, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(below, a < b)


def test_bfloat16_dot_in_a_loop_with_a_runtime_bound(guarded: GuardedMemory) -> None:
    a, b = random(16, N, dtype=torch.bfloat16, seed=1), random(N, 16, dtype=torch.bfloat16, seed=2)
    y = guarded.empty(16, 16, dtype=torch.bfloat16)
    _dot_kernel[(1,)](a, b, y, N, BLOCK=16)
    torch.testing.assert_close(y, (a.double() @ b.double()).bfloat16(), atol=0, rtol=2**-7)
