"""SwiGLU of many tokens matches the reference."""

import pytest
import torch

from fastllama.kernels import reference
from fastllama.kernels.swiglu import silu_mul
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 1), (19, 172), (3, 1536)], ids=lambda n: str(n))
def test_silu_mul_matches_reference(
    n_tokens: int, width: int, dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    x = guarded.copy((8 * random(n_tokens, 2 * width, dtype=dtype, seed=1)).to(device))
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(silu_mul(x), reference.silu_mul(x), atol=4 * ulp, rtol=2 * ulp)


def test_silu_mul_handles_extreme_values(device: torch.device) -> None:
    gate = torch.tensor([[-1e38, -200.0, 0.0, 200.0, 1e38]], device=device)
    ours = silu_mul(torch.cat([gate, torch.ones_like(gate)], 1))
    torch.testing.assert_close(ours, torch.tensor([[0.0, 0.0, 0.0, 200.0, 1e38]], device=device))


def test_silu_mul_rejects_odd_widths_and_strides(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"gate_up must have shape \(N, 2·F\), got \(2, 5\)"):
        silu_mul(torch.zeros(2, 5, device=device))
    with pytest.raises(ValueError, match="gate_up must be contiguous"):
        silu_mul(torch.zeros(6, 4, device=device).T)
