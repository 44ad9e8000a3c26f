"""Caches for kernel tests: guarded pages, in an order that no row has by chance."""

import torch
from torch import Tensor

from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache, pages_for
from tests.kernels.guards import GuardedMemory


def shuffled_table(n_rows: int, length: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """A table for `length` positions of each row, whose pages are in random order."""
    per_row = pages_for(length)
    order = torch.randperm(n_rows * per_row, generator=torch.Generator().manual_seed(seed))
    return order.view(n_rows, per_row).to(torch.int32).to(device)


def empty_cache(
    memory: GuardedMemory,
    n_rows: int,
    length: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LayerCache:
    """Pages that hold NaN, with a shuffled table; the last page belongs to no row."""
    table = memory.copy(shuffled_table(n_rows, length, device))
    shape = table.numel() + 1, n_kv_heads, PAGE_TOKENS, head_dim
    k, v = (memory.empty(*shape, dtype=dtype, device=device) for _ in range(2))
    return LayerCache(k, v, table)


def write_row(cache: LayerCache, row: int, k: Tensor, v: Tensor) -> None:
    """Write keys and values (K, n, D) to the row's positions from 0 on."""
    positions = torch.arange(k.shape[1], device=cache.k.device)
    pages, places = cache.places(torch.full_like(positions, row), positions)
    cache.k[pages, :, places] = k.transpose(0, 1).to(cache.k)
    cache.v[pages, :, places] = v.transpose(0, 1).to(cache.v)


def dense(cache: LayerCache, length: int | None = None) -> tuple[Tensor, Tensor]:
    """The keys and values of all rows, (B, K, length, D) each."""
    return cache.rows(0, cache.table.shape[0], cache.length if length is None else length)
