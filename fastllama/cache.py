"""The key/value cache: the keys and values of each row's earlier tokens."""

from collections.abc import Callable

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, (L, B, K, T, D) each: a kv head's T·D values are contiguous.

    Rows are independent. A row's positions from its length on may hold old values, which nothing reads.
    """

    def __init__(
        self,
        n_layers: int,
        max_batch_size: int,
        n_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        allocate: Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor],
    ) -> None:
        """Allocate both tensors, with the backend's `allocate`. Raises ValueError for a size below 1."""
        sizes = {
            "n_layers": n_layers,
            "max_batch_size": max_batch_size,
            "n_kv_heads": n_kv_heads,
            "max_seq_len": max_seq_len,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"the cache needs {name} of at least 1, got {size}")
        shape = tuple(sizes.values())
        self.k = allocate(shape, dtype, device).zero_()
        self.v = allocate(shape, dtype, device).zero_()

    @property
    def max_batch_size(self) -> int:
        """The number of rows."""
        return self.k.shape[1]

    @property
    def max_seq_len(self) -> int:
        """The number of positions per row."""
        return self.k.shape[3]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, (B, K, T, D) each, as views."""
        return self.k[index], self.v[index]
