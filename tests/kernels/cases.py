"""What kernel tests share: random data and the one table of tolerances."""

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Between a kernel and its twin, absolute and relative: sums come in another order, and half precision rounds them, and
# what is made of them, to the neighbouring value now and then (an ulp is 2^-8 in bfloat16 and 2^-11 in float16).
TOLERANCES = {
    ("rms_norm", torch.float32): 1e-5,
    ("rms_norm", torch.bfloat16): 8e-3,
    ("rms_norm", torch.float16): 1e-3,
    ("linear", torch.float32): 2e-5,
    ("linear", torch.bfloat16): 2e-2,
    ("linear", torch.float16): 2.5e-3,
    ("attention", torch.float32): 1e-5,
    ("attention", torch.bfloat16): 1e-2,
    ("attention", torch.float16): 1.5e-3,
    ("sample", torch.float32): 1e-5,
}


def random(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Normally distributed values, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_matches(op: str, ours: Tensor, expected: Tensor) -> None:
    """Compare a kernel's result with its twin's, by the table."""
    tolerance = TOLERANCES[op, ours.dtype]
    torch.testing.assert_close(ours, expected.to(ours.dtype), atol=tolerance, rtol=tolerance)
