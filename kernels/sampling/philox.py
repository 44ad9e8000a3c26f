"""Stateless random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A number depends only on (seed, stream, call) and position; no generator advances. So a row draws the same number in any
batch and any order. It is plain torch on int64 tensors that hold uint32 values.
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words from a counter of four words and a key of two, all int64 tensors of values below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps around, but its 64 bits are those of the unsigned product.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + WEYL_STEPS[0] & MASK, k1 + WEYL_STEPS[1] & MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, stream: Tensor, call: Tensor, position: Tensor) -> Tensor:
    """One float64 in [0, 1) per row, a multiple of 2**-24 (exact in float32, too): all arguments (B,) int64 -> (B,).

    The 64-bit seed is the key. Position, stream and call are the counter.
    """
    word = philox((position, stream, call, torch.zeros_like(call)), (seed & MASK, seed >> 32 & MASK))[0]
    return (word >> 8).double() * 2.0**-24
