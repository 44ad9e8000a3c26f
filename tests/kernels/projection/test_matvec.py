"""The projection of one token matches the reference's ops, at widths below one tile and rows of several tiles."""

from dataclasses import replace

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels.launch.target import Target
from fastllama.kernels.projection import matvec as module
from fastllama.kernels.projection.matvec import choose_launch, matvec
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory
from tests.kernels.projection.cases import EPS, SHAPES, Case, Shape, assert_appended, outside
from tests.support.tiers import parameters

H200 = Target("cuda", 90, 132, 232448)
STORIES = SHAPES["E64-H8-K4-D8-F172"]


LAUNCHES = {f"{name}-long-tiles": (dtype, 1) for name, dtype in DTYPES.items()}
LAUNCHES["bf16-short-tiles"] = torch.bfloat16, 24
CASES = {f"{shape}-{launch}": (SHAPES[shape], *LAUNCHES[launch]) for shape in SHAPES for launch in LAUNCHES}
QUICK = [*(f"E100-H3-K1-D20-F90-{launch}" for launch in LAUNCHES), "E192-H6-K2-D32-F480-bf16-long-tiles"]


@pytest.mark.parametrize("case", parameters(CASES, QUICK))
def test_matvec_matches_reference(
    case: tuple[Shape, torch.dtype, int],
    device: torch.device,
    guarded: GuardedMemory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launches for GPUs with few and with many multiprocessors differ in the rows per program."""
    shape, dtype, processors = case
    monkeypatch.setattr(module, "current_target", lambda: replace(H200, processors=processors))
    for with_biases in (False, True):
        one = Case(shape, 1, dtype, device, guarded, with_biases=with_biases)
        for residual in (None, one.h):
            y = matvec(one.x, one.w2, bias=one.b2, residual=residual)
            assert_matches("linear", y, one.expected_projection(residual))
        swiglu = matvec(one.h, one.w13, bias=one.b13, norm=one.norm, eps=EPS, swiglu=True)
        assert_matches("linear", swiglu, one.expected_swiglu())
        q = matvec(one.h, one.wqkv, bias=one.bqkv, norm=one.norm, eps=EPS, append_to=one.target)
        for ours, expected in zip((q, one.cache.k, one.cache.v), one.expected_qkv(), strict=True):
            assert_appended(ours, expected)
            assert_matches("linear", ours.nan_to_num(), expected.nan_to_num())


def test_matvec_appends_nothing_outside_the_cache(device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(STORIES, 1, torch.bfloat16, device, guarded)
    for position in range(2):
        batch = outside(2, device)
        target = case.target._replace(positions=batch.positions[position : position + 1].clone())
        matvec(case.h, case.wqkv, norm=case.norm, eps=EPS, append_to=target)
    assert case.cache.k.isnan().all() and case.cache.v.isnan().all()


def test_matvec_rounds_like_llama3(device: torch.device) -> None:
    """The norm is rounded before its weight, and the sums before the residual, each to bfloat16."""
    x, norm = random(1, 512, dtype=torch.bfloat16, seed=1), random(512, dtype=torch.bfloat16, seed=2)
    residual = random(1, 512, dtype=torch.bfloat16, seed=3) * 64
    weight = torch.eye(512, dtype=torch.bfloat16)  # so that no sum rounds
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean() + EPS)).bfloat16() * norm
    ours = matvec(x.to(device), weight.to(device), norm=norm.to(device), eps=EPS, residual=residual.to(device))
    # A GPU's rsqrt may differ in the last bit, which moves a few values across a rounding boundary.
    assert (ours.cpu() != residual + normed).float().mean() < 0.01


def test_matvec_keeps_its_launch_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows per program for the models and the GPU of the table in `choose_launch`."""
    monkeypatch.setattr(module, "current_target", lambda: H200)
    table = {
        (6144, 4096, 2): 2,
        (4096, 4096, 1): 4,
        (28672, 4096, 2): 2,
        (4096, 14336, 1): 1,
        (128256, 4096, 1): 4,
        (3072, 2048, 2): 4,
        (2048, 2048, 1): 4,
        (16384, 2048, 2): 4,
        (2048, 8192, 1): 2,
        (128256, 2048, 1): 8,
    }
    for (out_features, in_features, tiles), rows in table.items():
        launch = choose_launch(torch.zeros((), dtype=torch.bfloat16).expand(out_features, in_features), tiles)
        assert launch is not None and launch.rows == rows and launch.warps == 4, (out_features, in_features)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matvec_is_the_same_with_x_after_the_weights(
    shape: Shape, device: torch.device, guarded: GuardedMemory
) -> None:
    """x_first=False, which the GPU report measures, gives the same result."""
    case = Case(shape, 1, torch.bfloat16, device, guarded)
    chosen = choose_launch(case.w13, 2)
    assert chosen is not None and chosen.x_first
    results = [
        matvec(case.h, case.w13, norm=case.norm, eps=EPS, swiglu=True, launch=launch)
        for launch in (chosen, chosen._replace(x_first=False))
    ]
    assert torch.equal(*results)


def test_matvec_accepts_long_rows(device: torch.device) -> None:
    """Rows of 53,248 elements, the longest of any Llama, use more warps. Rows beyond 65,536 are refused."""
    x, weight = random(1, 53248, dtype=torch.bfloat16, seed=1), random(2, 53248, dtype=torch.bfloat16, seed=2)
    expected = (x.double() @ weight.double().T).bfloat16()
    torch.testing.assert_close(matvec(x.to(device), weight.to(device)).cpu(), expected, atol=2.0, rtol=1e-2)
    longer = torch.zeros(2, 65537, dtype=torch.bfloat16, device=device)
    assert choose_launch(longer, 1) is None
    with pytest.raises(ValueError, match="rows of 65537 elements of torch.bfloat16 are too long for matvec"):
        matvec(longer[:1], longer)


def test_matvec_rejects_invalid_arguments(device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(STORIES, 1, torch.float32, device, guarded)
    refusals = {
        "one token, x (1, IN), got (2, 64)": lambda: matvec(case.h.expand(2, -1), case.w13),
        "x must have shape (N, 172), got (1, 64)": lambda: matvec(case.h, case.w2),
        "weight must be torch.float32, got torch.bfloat16": lambda: matvec(case.h, case.w13.bfloat16()),
        "weight must be contiguous, got strides (1, 64)": lambda: matvec(case.x, case.w2.T.contiguous().T),
        "bias must have shape (344), got (64)": lambda: matvec(case.h, case.w13, bias=case.norm),
        "norm must have shape (64), got (63)": lambda: matvec(case.h, case.w13, norm=case.norm[:63]),
        "residual must have shape (1, 64), got (1, 172)": lambda: matvec(case.x, case.w2, residual=case.x),
        "2·F rows together, got 171": lambda: matvec(case.h, case.w13[:171], swiglu=True),
        "float32, bfloat16 or float16, got torch.int64": lambda: matvec(case.h.long(), case.w13),
        "multiple of 4, got 120 rows": lambda: matvec(case.h, case.wqkv[:120], append_to=case.target),
        "cache's 128 positions, got 127": lambda: matvec(
            case.h, case.wqkv, append_to=case.target._replace(rope=case.target.rope[:127])
        ),
        "rows must be torch.int64, got torch.int32": lambda: matvec(
            case.h, case.wqkv, append_to=case.target._replace(rows=case.target.rows.int())
        ),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
