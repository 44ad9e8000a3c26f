"""How far two right answers of an op may lie apart: the one table, for the kernels' tests and for their benchmarks.

Between a kernel and its twin, absolute and relative: sums come in another order, and half precision rounds them, and
what is made of them, to the neighbouring value now and then (an ulp is 2^-8 in bfloat16 and 2^-11 in float16).
"""

import torch
from torch import Tensor

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


def assert_matches(op: str, ours: Tensor, expected: Tensor) -> None:
    """Compare a kernel's result with its twin's. AssertionError, with the largest difference, beyond the table."""
    tolerance = TOLERANCES[op, ours.dtype]
    torch.testing.assert_close(ours, expected.to(ours.dtype), atol=tolerance, rtol=tolerance)
