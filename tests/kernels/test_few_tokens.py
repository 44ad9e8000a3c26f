"""The projection of a few tokens: against the reference's ops, with the sums of squares that norms are made from."""

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels.embedding import embed
from fastllama.kernels.few_tokens import RowSquares, choose_launch, few_tokens
from fastllama.kernels.target import Target
from tests.kernels.cases import DTYPES
from tests.kernels.guards import GuardedMemory
from tests.kernels.projections import EPS, SHAPES, Case, Shape, assert_appended, outside

STORIES = SHAPES["E64-H8-K4-D8-F172"]


def with_squares(case: Case) -> RowSquares:
    """The sums of squares of case.h, left by `embed`, which looks its rows up."""
    squares = RowSquares(case.h.device)
    squares.sums.fill_(torch.nan)
    case.h = embed(case.h, torch.arange(case.h.shape[0], device=case.h.device), squares)
    return squares


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("n_tokens", [1, 3, 8, 16], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_few_tokens_matches_reference(
    shape: Shape, n_tokens: int, dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    case = Case(shape, n_tokens, dtype, device, guarded)
    squares = with_squares(case)
    swiglu = few_tokens(case.h, case.w13, squares, norm=case.norm, eps=EPS, swiglu=True)
    assert_matches("linear", swiglu, case.expected_swiglu())
    q = few_tokens(case.h, case.wqkv, squares, norm=case.norm, eps=EPS, append=case.append)
    for ours, expected in zip((q, *case.append[:2]), case.expected_qkv(), strict=True):
        assert_appended(ours, expected)
        assert_matches("linear", ours.nan_to_num(), expected.nan_to_num())
    for residual in (None, case.h):
        y = few_tokens(case.x, case.w2, squares, residual=residual)
        assert_matches("linear", y, case.expected_projection(residual))


def test_few_tokens_appends_nothing_outside_the_cache(device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(STORIES, 4, torch.bfloat16, device, guarded)
    append = case.append._replace(positions=outside(4, device).positions)
    few_tokens(case.h, case.wqkv, with_squares(case), append=append)
    assert case.append.cache_k.isnan().all() and case.append.cache_v.isnan().all()


@pytest.mark.parametrize("n_tokens", [2, 16], ids=lambda n: f"N{n}")
def test_few_tokens_leaves_sums_of_squares(n_tokens: int, device: torch.device, guarded: GuardedMemory) -> None:
    """Whoever makes a hidden state leaves its sums; they are recognised by the tensor they belong to."""
    case = Case(SHAPES["E192-H6-K2-D32-F480"], n_tokens, torch.bfloat16, device, guarded)
    squares = with_squares(case)
    assert squares.of(case.h) == 1
    y = few_tokens(case.x, case.w2, squares, residual=case.h)
    parts = squares.of(y)
    assert parts > 1 and squares.of(case.h) == 0 and squares.of(y.clone()) == 0
    torch.testing.assert_close(squares.sums[:parts, :n_tokens].sum(0), y.float().pow(2).sum(-1))
    few_tokens(y, case.w13, squares, norm=case.norm, eps=EPS, swiglu=True)
    assert squares.of(y) == parts, "a projection that is no hidden state leaves the sums alone"


def test_few_tokens_repeats_itself(device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(STORIES, 5, torch.bfloat16, device, guarded)
    squares = with_squares(case)
    first = few_tokens(case.h, case.w13, squares, norm=case.norm, eps=EPS, swiglu=True)
    assert torch.equal(first, few_tokens(case.h, case.w13, squares, norm=case.norm, eps=EPS, swiglu=True))


@pytest.mark.parametrize("shared_bytes", [65536, 101376, 166912, 232448])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_few_tokens_fits_shared_memory(shared_bytes: int, itemsize: int) -> None:
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    for out_features, in_features, tiles in ((6144, 4096, 2), (28672, 4096, 2), (4096, 14336, 1), (512, 100, 1)):
        weight = torch.zeros((), dtype=dtype).expand(out_features, in_features)
        launch = choose_launch(weight, tiles, 16, Target("cuda", 90, 132, shared_bytes))
        assert (launch.rows * tiles + 16) * launch.chunk * itemsize * launch.stages <= shared_bytes


def test_few_tokens_rejects_what_does_not_belong_together(device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(STORIES, 3, torch.float32, device, guarded)
    squares = with_squares(case)
    many = case.h.repeat(6, 1)
    with pytest.raises(ValueError, match="few_tokens takes 1 to 16 tokens, got 18"):
        few_tokens(many, case.w13, squares)
    with pytest.raises(ValueError, match="sums of squares of x, but those in hand are another tensor's"):
        few_tokens(case.h.clone(), case.w13, squares, norm=case.norm, eps=EPS)
    with pytest.raises(ValueError, match="only a plain projection takes a residual"):
        few_tokens(case.h, case.w13, squares, residual=case.x, swiglu=True)
