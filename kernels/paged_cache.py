"""One layer's key/value cache in pages.

A page holds the keys, or the values, of PAGE_TOKENS adjacent positions of one row. The page table says which pages a
row has, in order:

    position t of row b, kv head k:   cache.k[table[b, t // PAGE_TOKENS], k, t % PAGE_TOKENS]

So rows of any lengths share one memory, and rows with the same beginning can share pages. The table is on the device: a
captured step reads it and needs no change when pages move. The last page belongs to no row. Inactive rows use it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PAGE_TOKENS = 64  # one tile of decode attention


class LayerCache(NamedTuple):
    """The keys and values of P pages, and the table of B rows of up to M pages. Every entry is a page's number."""

    k: Tensor  # (P, K, PAGE_TOKENS, D) in the model dtype
    v: Tensor  # (P, K, PAGE_TOKENS, D)
    table: Tensor  # (B, M) int32

    @classmethod
    def of(
        cls, n_rows: int, length: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> "LayerCache":
        """Zeros, with pages for `length` positions of each row."""
        per_row = pages_for(length)
        shape = n_rows * per_row + 1, n_kv_heads, PAGE_TOKENS, head_dim
        table = torch.arange(n_rows * per_row, dtype=torch.int32, device=device).view(n_rows, per_row)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(k, v, table)

    @property
    def length(self) -> int:
        """T, the number of positions of a row."""
        return self.table.shape[1] * PAGE_TOKENS

    @property
    def unused_page(self) -> int:
        """The page that belongs to no row."""
        return self.k.shape[0] - 1

    def places(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's page and place in it, (N,) int64 both, in the unused page for a position outside the cache."""
        inside = (positions >= 0) & (positions < self.length)
        known = torch.where(inside, positions, 0)
        pages = torch.where(inside, self.table[rows, known // PAGE_TOKENS], self.unused_page)
        return pages, known % PAGE_TOKENS

    def rows(self, begin: int, end: int, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `length` keys and values of rows [begin, end), (rows, K, length, D) each."""
        pages = self.table[begin:end, : pages_for(length)]
        gathered = (memory[pages].transpose(1, 2).flatten(2, 3)[:, :, :length] for memory in (self.k, self.v))
        k, v = gathered
        return k, v


def pages_for(n_tokens: int) -> int:
    """The number of pages for so many positions."""
    return -(-n_tokens // PAGE_TOKENS)
