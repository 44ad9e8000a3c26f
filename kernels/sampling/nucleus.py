"""Top-p: which tokens it keeps."""

import torch
from torch import Tensor


def nucleus(order_by: Tensor, mass: Tensor, limit: Tensor) -> Tensor:
    """The tokens that top-p keeps: those before which, in descending order, at most `limit` of mass lies.

    order_by (B, V) ranks the tokens, the lowest ids first among equals; mass (B, V) weighs them; limit (B,), which is
    top_p times the total mass -> (B, V) bool. Sums and compares in the dtype of mass.
    """
    order = order_by.argsort(dim=-1, descending=True, stable=True)
    ordered = mass.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    keep = before <= limit[:, None]
    return torch.zeros_like(keep).scatter(-1, order, keep)
