"""Meta's `sample_top_p`, for programs that call it. The decode step samples on the device (`kernels/sampling`)."""

import torch
from torch import Tensor

from fastllama import validate
from fastllama.kernels.sampling.top_p_torch import nucleus
from fastllama.torch_settings import with_default_settings


@with_default_settings
def sample_top_p(probs: Tensor, p: float) -> Tensor:
    """Draw one token per row by nucleus sampling with mass p: probs (B, V) -> (B, 1) int64.

    Uses torch's default generator. Raises ValueError for probs that are not (B, V), or a p that is negative or not a
    number.
    """
    if not isinstance(probs, Tensor) or probs.ndim != 2 or 0 in probs.shape or not probs.is_floating_point():
        got = tuple(probs.shape) if isinstance(probs, Tensor) and probs.is_floating_point() else validate.kind(probs)
        raise ValueError(f"probs must have shape (B, V), got {got}")
    p = validate.top_p(p)
    limit = torch.full(probs.shape[:1], p if p < 1 else torch.inf, dtype=probs.dtype, device=probs.device)
    keep = nucleus(probs, probs, limit)
    return torch.multinomial(torch.where(keep, probs, 0), num_samples=1)
