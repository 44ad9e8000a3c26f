"""The native ops around the library's matrix product, and the embedding, against the reference."""

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import native, reference
from fastllama.kernels.batch import RaggedBatch
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory
from tests.kernels.projection.cases import LENGTH, N_ROWS, scattered

CPU = torch.device("cpu")
HEADS = {"H8-K2-D64": (8, 2, 64), "H8-K4-D8": (8, 4, 8), "H3-K1-D20": (3, 1, 20)}

pytestmark = pytest.mark.usefixtures("isa", "threads")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 64), (16, 100), (21, 192)], ids=str)
def test_embed_matches_reference(n_tokens: int, width: int, dtype: torch.dtype, guarded: GuardedMemory) -> None:
    """Ids outside the vocabulary read the table's ends, or give zeros where the table is a slice."""
    table = guarded.copy(random(50, width, dtype=dtype, seed=1))
    batch = RaggedBatch.of([(0, 0, ([3, -1, 49, 50, 2**40, -(2**40), 0] * 3)[:n_tokens])], CPU)
    for begin in (None, 0, 7):
        assert torch.equal(native.embed(table, batch, begin), reference.embed(table, batch, begin))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 5), (16, 100), (23, 192)], ids=str)
def test_norm_and_swiglu_match_reference(n_tokens: int, width: int, dtype: torch.dtype, guarded: GuardedMemory) -> None:
    x, weight = (guarded.copy(random(*shape, dtype=dtype)) for shape in ((n_tokens, width), (width,)))
    assert_matches("rms_norm", native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    gate_up = guarded.copy(random(n_tokens, 2 * width, seed=3).mul(20).to(dtype))
    assert_matches("linear", native.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("n_tokens", [1, 23], ids=lambda n: f"N{n}")
def test_rope_append_matches_reference(
    n_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, guarded: GuardedMemory
) -> None:
    n_heads, n_kv_heads, head_dim = heads
    x = guarded.copy(random(n_tokens, (n_heads + 2 * n_kv_heads) * head_dim, dtype=dtype, seed=1))
    angles = random(LENGTH, head_dim // 2, seed=2)
    rope = guarded.copy(torch.stack([angles.cos(), angles.sin()], -1))
    ours = [guarded.empty(N_ROWS, n_kv_heads, LENGTH, head_dim, dtype=dtype) for _ in range(2)]
    expected = [torch.full_like(tensor, torch.nan) for tensor in ours]
    batch = scattered(n_tokens, CPU)
    ours.append(native.rope_append(x, rope, ours[0], ours[1], batch))
    expected.append(reference.rope_append(x, rope, expected[0], expected[1], batch))
    for mine, theirs in zip(ours, expected, strict=True):
        # One rounding of a sum of two products: equal, except for the last bit with fused multiply-add.
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=torch.finfo(dtype).eps, equal_nan=True)


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
