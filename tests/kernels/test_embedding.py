"""The embedding equals the reference and never reads outside the table."""

import pytest
import torch

from fastllama.kernels import reference
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.embedding import embed
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 64), (16, 100), (21, 192)], ids=lambda n: str(n))
def test_embed_matches_reference(
    n_tokens: int, width: int, dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    """Ids below or above the vocabulary read the table's first or last row. Guard bands surround the table."""
    table = guarded.copy(random(50, width, dtype=dtype, seed=1).to(device))
    ids = [3, -1, 49, 50, 2**40, -(2**40), 0] * 3
    batch = RaggedBatch.of([(0, 0, ids[:n_tokens])], device)
    assert torch.equal(embed(table, batch.tokens), reference.embed(table, batch))


@pytest.mark.parametrize("begin", [0, 50, 100])
def test_embed_gives_zeros_for_tokens_outside_its_slice(
    begin: int, device: torch.device, guarded: GuardedMemory
) -> None:
    table_of_all = random(150, 100, seed=1).to(device)
    table = guarded.copy(table_of_all[begin : begin + 50])
    tokens = torch.tensor([0, 49, 50, 99, 100, 149, -1, 150, 2**40, -(2**40)], device=device)
    inside = (tokens >= begin) & (tokens < begin + 50)
    expected = torch.where(inside[:, None], table_of_all[tokens.clamp(0, 149)], 0)
    batch = RaggedBatch.of([(0, 0, tokens.tolist())], device)
    for h in (embed(table, tokens, begin), reference.embed(table, batch, begin)):
        assert torch.equal(h, expected)


def test_embed_rejects_invalid_arguments(device: torch.device) -> None:
    table = torch.zeros(5, 4, device=device)
    with pytest.raises(ValueError, match="tokens must be torch.int64, got torch.int32"):
        embed(table, torch.zeros(2, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="table must be contiguous"):
        embed(torch.zeros(4, 5, device=device).T, torch.zeros(2, dtype=torch.int64, device=device))
