"""The tolerances of all tests and benchmarks: how much two correct results may differ.

An op's tolerance is both absolute and relative, between a kernel and the reference implementation. They sum in
different orders, so half precision sometimes rounds to the adjacent value (an ulp is 2^-8 in bfloat16 and 2^-11 in
float16). A complete model's tolerances are absolute, for logits and for log-probabilities in nats.
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
    # The same backend on several processes or several threads.
    ("divided logprobs", torch.float32): 2e-5,
}
WHOLE_MODEL = ("logits", "logprobs", "divided logprobs")


def assert_matches(what: str, ours: Tensor, expected: Tensor) -> None:
    """Compare two results in the dtype of ours. AssertionError, with the largest difference, beyond the tolerance.

    NaN does not match NaN.
    """
    tolerance = TOLERANCES[what, ours.dtype]
    relative = 0.0 if what in WHOLE_MODEL else tolerance
    torch.testing.assert_close(ours, expected.to(ours.dtype), atol=tolerance, rtol=relative)
