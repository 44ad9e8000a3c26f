"""The native embedding against the reference, and the conversion of 16-bit values."""

import pytest
import torch

from fastllama.kernels import native, reference
from fastllama.kernels.batch import RaggedBatch
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("isa", "threads")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 64), (16, 100), (21, 192)], ids=str)
def test_embed_matches_reference(n_tokens: int, width: int, dtype: torch.dtype, guarded: GuardedMemory) -> None:
    """Ids outside the vocabulary read the table's ends, or give zeros where the table is a slice."""
    table = guarded.copy(random(50, width, dtype=dtype, seed=1))
    batch = RaggedBatch.of([(0, 0, ([3, -1, 49, 50, 2**40, -(2**40), 0] * 3)[:n_tokens])], CPU)
    for begin in (None, 0, 7):
        assert torch.equal(native.embed(table, batch, begin), reference.embed(table, batch, begin))


def test_every_half_precision_value_is_kept_and_rounded() -> None:
    """Through the embedding's table and a product with 1: widening is exact and rounding is torch's."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    batch = RaggedBatch.of([(0, 0, [0])], CPU)
    for dtype in (torch.bfloat16, torch.float16):
        every = bits.view(dtype)
        finite = every[every.float().abs() < torch.finfo(dtype).max / 2]
        one = torch.ones(1, 1, dtype=dtype)
        doubled = native.linear_residual(one, finite[:, None], finite[None], batch)
        assert torch.equal(doubled[0], finite + finite)
