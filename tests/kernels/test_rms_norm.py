"""RMSNorm matches the reference and rounds where Meta's code rounds."""

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import reference
from fastllama.kernels.rms_norm import rms_norm
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 1), (3, 172), (17, 192), (2, 4096)], ids=lambda n: str(n))
def test_rms_norm_matches_reference(
    n_tokens: int, width: int, dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    x = guarded.copy(random(n_tokens, width, dtype=dtype, seed=1).to(device))
    weight = guarded.copy(random(width, dtype=dtype, seed=3).to(device))
    assert_matches("rms_norm", rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


def test_rms_norm_rounds_like_llama3(device: torch.device) -> None:
    """The normalized row is rounded before it is multiplied by the weight."""
    x, weight = (random(*shape, dtype=torch.bfloat16, seed=1) for shape in ((5, 512), (512,)))
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()
    late = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS) * weight).bfloat16()
    ours = rms_norm(x.to(device), weight.to(device), EPS).cpu()
    # A GPU's rsqrt may differ in the last bit, which moves a few values across a rounding boundary.
    assert (ours != normed * weight).float().mean() < 0.01 < (ours != late).float().mean()


def test_rms_norm_accepts_zero_rows(device: torch.device) -> None:
    empty = torch.zeros(0, 8, device=device)
    assert rms_norm(empty, torch.ones(8, device=device), EPS).shape == (0, 8)


def test_rms_norm_rejects_invalid_arguments(device: torch.device) -> None:
    x, weight = random(3, 8, device=device), random(8, device=device)
    refusals = {
        "x must be contiguous, got strides (1, 3)": lambda: rms_norm(x.T.contiguous().T, weight, EPS),
        "weight must have shape (8), got (7)": lambda: rms_norm(x, weight[:7], EPS),
        "weight must be torch.float32, got torch.float16": lambda: rms_norm(x, weight.half(), EPS),
        "x must be float32, bfloat16 or float16, got torch.float64": lambda: rms_norm(x.double(), weight, EPS),
        "up to 65536 elements, got 65537": lambda: rms_norm(torch.zeros(1, 65537, device=device), weight, EPS),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
