"""The projection of a few tokens matches the reference's ops."""

from typing import Any

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels.launch.dependent import PREFETCH_BYTES
from fastllama.kernels.launch.target import Target, current_target
from fastllama.kernels.projection import few_tokens as module
from fastllama.kernels.projection.few_tokens import Launch, choose_launch, few_tokens
from tests.kernels.cases import DTYPES
from tests.kernels.guards import GuardedMemory
from tests.kernels.projection.cases import EPS, SHAPES, Case, Shape, assert_appended, outside
from tests.support.tiers import parameters

STORIES = SHAPES["E64-H8-K4-D8-F172"]


@pytest.mark.parametrize("dtype", parameters(DTYPES, quick=("bf16",)))
@pytest.mark.parametrize("n_tokens", parameters({f"N{n}": n for n in (1, 3, 8, 16)}, quick=("N3", "N16")))
@pytest.mark.parametrize("shape", parameters(SHAPES, quick=("E192-H6-K2-D32-F480", "E100-H3-K1-D20-F90")))
def test_few_tokens_matches_reference(
    shape: Shape, n_tokens: int, dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    for with_biases in (False, True):
        case = Case(shape, n_tokens, dtype, device, guarded, with_biases=with_biases)
        swiglu = few_tokens(case.h, case.w13, bias=case.b13, norm=case.norm, eps=EPS, swiglu=True)
        assert_matches("linear", swiglu, case.expected_swiglu())
        q = few_tokens(case.h, case.wqkv, bias=case.bqkv, norm=case.norm, eps=EPS, append_to=case.target)
        for ours, expected in zip((q, case.cache.k, case.cache.v), case.expected_qkv(), strict=True):
            assert_appended(ours, expected)
            assert_matches("linear", ours.nan_to_num(), expected.nan_to_num())
        for residual in (None, case.h):
            y = few_tokens(case.x, case.w2, bias=case.b2, residual=residual)
            assert_matches("linear", y, case.expected_projection(residual))


def test_few_tokens_appends_nothing_outside_the_cache(device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(STORIES, 4, torch.bfloat16, device, guarded)
    target = case.target._replace(positions=outside(4, device).positions)
    few_tokens(case.h, case.wqkv, append_to=target)
    assert case.cache.k.isnan().all() and case.cache.v.isnan().all()


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_few_tokens_keeps_precision_at_small_and_large_scales(
    scale: float, device: torch.device, guarded: GuardedMemory
) -> None:
    """Small and large hidden states keep their precision until the norm divides, even in float16."""
    case = Case(SHAPES["E192-H6-K2-D32-F480"], 5, torch.float16, device, guarded)
    case.h = guarded.copy(case.h * scale)
    ours = few_tokens(case.h, case.w13, norm=case.norm, eps=EPS, swiglu=True)
    assert_matches("linear", ours, case.expected_swiglu())


@pytest.mark.parametrize("accumulators", [1, 2, 4])
@pytest.mark.parametrize(
    "shape", parameters({"narrow": "E100-H3-K1-D20-F90", "wide": "E512-H3-K1-D64-F768"}, quick=("narrow",))
)
def test_few_tokens_matches_reference_with_any_number_of_accumulators(
    shape: str, accumulators: int, device: torch.device, guarded: GuardedMemory
) -> None:
    """Chunks need not divide a row."""
    case = Case(SHAPES[shape], 5, torch.bfloat16, device, guarded)
    launch = Launch(rows=16, chunk=32, stages=2, warps=2, accumulators=accumulators)
    swiglu = few_tokens(case.h, case.w13, norm=case.norm, eps=EPS, swiglu=True, launch=launch)
    assert_matches("linear", swiglu, case.expected_swiglu())
    y = few_tokens(case.x, case.w2, residual=case.h, launch=launch._replace(warps=1))
    assert_matches("linear", y, case.expected_projection(case.h))


def test_few_tokens_keeps_its_launch_table() -> None:
    """Rows, accumulators and stages for the models and the GPU of the table in `choose_launch`."""
    table = {
        (6144, 4096, 2, 8): (16, 1, 8),
        (4096, 4096, 1, 8): (16, 2, 7),
        (4096, 4096, 1, 16): (32, 1, 8),
        (28672, 4096, 2, 8): (64, 1, 3),
        (128256, 4096, 1, 16): (64, 1, 3),
        (3072, 2048, 2, 16): (16, 2, 7),
        (2048, 2048, 1, 8): (16, 2, 8),
        (16384, 2048, 2, 8): (32, 1, 4),
        (1280, 8192, 2, 8): (16, 4, 4),
    }
    for (out_features, in_features, tiles, columns), expected in table.items():
        weight = torch.zeros((), dtype=torch.bfloat16).expand(out_features, in_features)
        launch = choose_launch(weight, tiles, columns, Target("cuda", 90, 132, 232448))
        assert (launch.rows, launch.accumulators, launch.stages) == expected, (out_features, in_features, columns)


def test_few_tokens_repeats_bit_for_bit(device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(STORIES, 5, torch.bfloat16, device, guarded)
    first = few_tokens(case.h, case.w13, norm=case.norm, eps=EPS, swiglu=True)
    assert torch.equal(first, few_tokens(case.h, case.w13, norm=case.norm, eps=EPS, swiglu=True))


@pytest.mark.parametrize("shared_bytes", [65536, 101376, 166912, 232448])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_few_tokens_fits_shared_memory(shared_bytes: int, itemsize: int) -> None:
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    for out_features, in_features, tiles in ((6144, 4096, 2), (28672, 4096, 2), (4096, 14336, 1), (512, 100, 1)):
        weight = torch.zeros((), dtype=dtype).expand(out_features, in_features)
        launch = choose_launch(weight, tiles, 16, Target("cuda", 90, 132, shared_bytes))
        assert (
            launch.rows * tiles + 16
        ) * launch.chunk * launch.accumulators * itemsize * launch.stages <= shared_bytes


def test_few_tokens_rejects_invalid_arguments(device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(STORIES, 3, torch.float32, device, guarded)
    many = case.h.repeat(6, 1)
    with pytest.raises(ValueError, match="few_tokens takes 1 to 16 tokens, got 18"):
        few_tokens(many, case.w13)
    with pytest.raises(ValueError, match="only a plain projection takes a residual"):
        few_tokens(case.h, case.w13, residual=case.x, swiglu=True)


@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("n_tokens", [3, 16])
def test_programs_of_a_multiprocessor_share_its_prefetches(
    n_tokens: int, swiglu: bool, device: torch.device, guarded: GuardedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs of a multiprocessor prefetch PREFETCH_BYTES together, for any number of programs and tiles."""
    case = Case(SHAPES["E512-H3-K1-D64-F768"], n_tokens, torch.bfloat16, device, guarded)
    budgets: list[int] = []
    launched: dict[str, Any] = {}

    def record(row_bytes: int, max_bytes: int, rows: int) -> int:
        budgets.append(max_bytes)
        return 0

    monkeypatch.setattr(module, "prefetch_bytes", record)
    monkeypatch.setattr(module, "_few_tokens_kernel", {(1,): lambda *_, **options: launched.update(options)})
    monkeypatch.setattr(module, "ceil_div", lambda *_: 1)
    for stages in (2, 8):
        few_tokens(case.h, case.w13, swiglu=swiglu, launch=Launch(rows=16, chunk=128, stages=stages, warps=2))
        programs = launched["RESIDENT"] // current_target().processors
        in_all = programs * (2 if swiglu else 1) * budgets.pop()
        assert programs > 1 and 0.9 * PREFETCH_BYTES < in_all <= PREFETCH_BYTES
