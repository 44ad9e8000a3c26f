"""How far two right answers may lie apart: the one table, for all tests and benchmarks.

Of an op, between a kernel and its twin, absolute and relative: sums come in another order, and half precision rounds
them, and what is made of them, to the neighbouring value now and then (an ulp is 2^-8 in bfloat16 and 2^-11 in
float16). Of a whole model, absolute: logits, and nats of log-probability.
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
    ("logits", torch.float32): 1e-4,
    ("logits", torch.bfloat16): 0.1,
    ("logits", torch.float16): 0.02,
    ("logprobs", torch.float32): 1e-4,
    ("logprobs", torch.bfloat16): 0.15,
    ("logprobs", torch.float16): 0.02,
    # Of the same backend on several processes, or on several threads.
    ("divided logprobs", torch.float32): 2e-5,
}
WHOLE_MODEL = ("logits", "logprobs", "divided logprobs")


def assert_matches(what: str, ours: Tensor, expected: Tensor) -> None:
    """Compare two answers that are both in ours' dtype. AssertionError, with the largest difference, beyond the table.

    NaN matches NaN in neither.
    """
    tolerance = TOLERANCES[what, ours.dtype]
    relative = 0.0 if what in WHOLE_MODEL else tolerance
    torch.testing.assert_close(ours, expected.to(ours.dtype), atol=tolerance, rtol=relative)
