"""Rotary embedding and cache append of many tokens match the reference and write nothing else."""

import pytest
import torch

from fastllama.kernels import reference
from fastllama.kernels.paged_cache import LayerCache
from fastllama.kernels.rope import rope_append
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory
from tests.kernels.pages import empty_cache
from tests.kernels.projection.cases import LENGTH, N_ROWS, outside, scattered

SHAPES = {"H8-K2-D64": (8, 2, 64), "H8-K4-D8": (8, 4, 8), "H3-K1-D20": (3, 1, 20), "H40-K8-D128": (40, 8, 128)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 23], ids=lambda n: f"N{n}")
def test_rope_append_matches_reference(
    n_tokens: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    n_heads, n_kv_heads, head_dim = shape
    width = (n_heads + 2 * n_kv_heads) * head_dim
    heads = guarded.copy(random(n_tokens, width, dtype=dtype, seed=1).to(device))
    angles = random(LENGTH, head_dim // 2, seed=2)
    rope = guarded.copy(torch.stack([angles.cos(), angles.sin()], -1).to(device))
    cache = empty_cache(guarded, N_ROWS, LENGTH, n_kv_heads, head_dim, dtype, device)
    expected = LayerCache(torch.full_like(cache.k, torch.nan), torch.full_like(cache.v, torch.nan), cache.table)
    batch = scattered(n_tokens, device)
    q = rope_append(heads, rope, cache, batch)
    expected_q = reference.rope_append(heads, rope, expected, batch)
    for tensor, wanted in ((q, expected_q), (cache.k, expected.k), (cache.v, expected.v)):
        assert torch.equal(tensor.isnan(), wanted.isnan())
        # One rounding of a sum of two products: equal, except for the last bit with fused multiply-add.
        torch.testing.assert_close(tensor, wanted, atol=1e-6, rtol=dtype_ulp(dtype), equal_nan=True)


def dtype_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def test_rope_append_appends_nothing_outside_the_cache(device: torch.device, guarded: GuardedMemory) -> None:
    cache = empty_cache(guarded, N_ROWS, LENGTH, 2, 8, torch.float32, device)
    rope = guarded.copy(torch.ones(LENGTH, 4, 2, device=device))
    rope_append(random(4, 64, device=device), rope, cache, outside(4, device))
    assert cache.k.isnan().all() and cache.v.isnan().all()


def test_rope_append_rejects_invalid_arguments(device: torch.device) -> None:
    cache = LayerCache.of(N_ROWS, LENGTH, 2, 8, torch.float32, device)
    rope = torch.zeros(LENGTH, 4, 2, device=device)
    batch = scattered(6, device)
    heads = torch.zeros(6, 64, device=device)
    refusals = {
        "multiple of 2, got 56 rows": lambda: rope_append(heads[:, :56].contiguous(), rope, cache, batch),
        "cache.v must have shape (9, 2, 64, 8)": lambda: rope_append(
            heads, rope, cache._replace(v=cache.v[:, :1]), batch
        ),
        "rope must be torch.float32": lambda: rope_append(heads, rope.half(), cache, batch),
        "rope must hold the cache's 128 positions, got 127": lambda: rope_append(heads, rope[:127], cache, batch),
        "positions must have shape (5), got (6)": lambda: rope_append(heads[:5], rope, cache, batch),
        "even head dims up to 256, got 258": lambda: rope_append(
            heads, rope, LayerCache.of(1, LENGTH, 1, 258, torch.float32, device), batch
        ),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
