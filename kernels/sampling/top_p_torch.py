"""Top-p: the set of tokens that it keeps (the nucleus)."""

import torch
from torch import Tensor


def nucleus(order_by: Tensor, mass: Tensor, limit: Tensor) -> Tensor:
    """Which tokens top-p keeps: those with at most `limit` of mass before them, in descending order -> (B, V) bool.

    order_by (B, V) orders the tokens; among equals the lowest ids come first. mass (B, V): the tokens' weights. limit
    (B,): top_p times the total mass. Sums and compares in the dtype of mass.
    """
    order = order_by.argsort(dim=-1, descending=True, stable=True)
    ordered = mass.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    keep = before <= limit[:, None]
    return torch.zeros_like(keep).scatter(-1, order, keep)
