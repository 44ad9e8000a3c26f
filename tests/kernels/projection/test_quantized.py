"""The projections with quantised weights match the reference's ops with the same weights."""

from dataclasses import replace

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import fused
from fastllama.kernels.launch.target import Target
from fastllama.kernels.projection import quantized_matvec as module
from fastllama.kernels.projection.packing import checked
from fastllama.kernels.projection.quantized_few_tokens import quantized_few_tokens
from fastllama.kernels.projection.quantized_matvec import quantized_matvec
from fastllama.kernels.quantized import QuantizedWeight
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory
from tests.kernels.projection.cases import EPS, SHAPES, Case, assert_appended, outside
from tests.kernels.projection.quantized_cases import BY_ROW, NAMES, quantize_case, quantized_as
from tests.support.tiers import parameters

H200 = Target("cuda", 90, 132, 232448)
SMALL, ODD, WIDE = "E192-H6-K2-D32-F480", "E100-H3-K1-D20-F90", "E512-H3-K1-D64-F768"


def shape_for(name: str, *, odd: bool) -> str:
    """The name of a shape whose widths a format's groups divide."""
    if name in BY_ROW:
        return ODD if odd else SMALL
    return SMALL if name.split("-")[1] == "g32" else WIDE


def assert_all_ops_match(case: Case) -> None:
    """Each epilogue, with the kernel for the case's tokens."""
    w13, wqkv, w2 = (checked(fused.pack(weight)) for weight in (case.w13, case.wqkv, case.w2))  # type: ignore[arg-type]
    kernels = (quantized_matvec, quantized_few_tokens) if case.h.shape[0] == 1 else (quantized_few_tokens,)
    for kernel in kernels:
        swiglu = kernel(case.h, w13, bias=case.b13, norm=case.norm, eps=EPS, swiglu=True)
        assert_matches("linear", swiglu, case.expected_swiglu())
        for cache in (case.cache.k, case.cache.v):
            cache.fill_(torch.nan)
        q = kernel(case.h, wqkv, bias=case.bqkv, norm=case.norm, eps=EPS, append_to=case.target)
        for ours, expected in zip((q, case.cache.k, case.cache.v), case.expected_qkv(), strict=True):
            assert_appended(ours, expected)
            assert_matches("linear", ours.nan_to_num(), expected.nan_to_num())
        for residual in (None, case.h):
            y = kernel(case.x, w2, bias=case.b2, residual=residual)
            assert_matches("linear", y, case.expected_projection(residual))


@pytest.mark.parametrize("dtype", parameters(DTYPES, quick=("bf16",)))
@pytest.mark.parametrize("n_tokens", parameters({f"N{n}": n for n in (1, 3, 16)}, quick=("N1", "N3")))
@pytest.mark.parametrize(
    "name", parameters({name: name for name in NAMES}, quick=("fp8", "int4-g128-zeros", "int8-g32"))
)
def test_projections_match_the_reference(
    name: str, n_tokens: int, dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    case = Case(SHAPES[shape_for(name, odd=False)], n_tokens, dtype, device, guarded, with_biases=n_tokens == 3)
    quantize_case(case, name)
    assert_all_ops_match(case)


@pytest.mark.parametrize("dtype", parameters(DTYPES, quick=("fp32",)))
@pytest.mark.parametrize("n_tokens", parameters({f"N{n}": n for n in (1, 5)}, quick=("N1",)))
@pytest.mark.parametrize("name", BY_ROW)
def test_rows_of_any_length(
    name: str, n_tokens: int, dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    """Rows are padded: 90 and 100 columns are no multiple of a block, 90 not of a run."""
    case = Case(SHAPES[ODD], n_tokens, dtype, device, guarded, with_biases=n_tokens == 1)
    quantize_case(case, name)
    assert_all_ops_match(case)


@pytest.mark.parametrize("name", parameters({name: name for name in ("int8", "int4-g32")}, quick=("int8",)))
def test_many_multiprocessors_get_few_rows_each(
    name: str, device: torch.device, guarded: GuardedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "current_target", lambda: replace(H200, processors=24))
    case = Case(SHAPES[SMALL], 1, torch.bfloat16, device, guarded)
    quantize_case(case, name)
    assert_all_ops_match(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "int4-g32"])
def test_more_tokens_are_multiplied_by_the_library(name: str, device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(SHAPES[shape_for(name, odd=True)], 20, torch.float32, device, guarded, with_biases=True)
    quantize_case(case, name)
    w2 = fused.pack(case.w2)
    for residual in (None, case.h):
        expected = case.expected_projection(residual)
        ours = fused.linear_residual(case.x, w2, None if residual is None else residual.clone(), case.batch, case.b2)
        assert_matches("linear", ours, expected)


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_nothing_is_appended_outside_the_cache(n_tokens: int, device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(SHAPES[SMALL], n_tokens, torch.bfloat16, device, guarded)
    quantize_case(case, "int8")
    target = case.target._replace(positions=outside(n_tokens, device).positions)
    kernel = quantized_matvec if n_tokens == 1 else quantized_few_tokens
    kernel(case.h, checked(fused.pack(case.wqkv)), append_to=target)  # type: ignore[arg-type]
    assert case.cache.k.isnan().all() and case.cache.v.isnan().all()


@pytest.mark.parametrize("name", ["int8", "fp8", "int4-g128"])
def test_x_of_any_size_is_multiplied_exactly(name: str, device: torch.device) -> None:
    """Tiny and huge x beside each other: each result is as exact as float32 sums are."""
    weight = quantized_as(name, random(16, 256, seed=1)).to(device)
    x = (random(1, 256, seed=2) * torch.logspace(-20, 15, 256)[torch.randperm(256)]).bfloat16().to(device)
    ours = quantized_matvec(x.float(), checked(fused.pack(weight)))  # type: ignore[arg-type]
    wide = x.double() @ weight.dequantized().double().T
    size = x.double().abs() @ weight.dequantized().double().abs().T
    assert ((ours.double() - wide).abs() / size).max() < 1e-6


def test_launch_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows per program for the models and the GPU of the table in `choose_launch`."""
    monkeypatch.setattr(module, "current_target", lambda: H200)
    table = {(6144, 4096, 2): 4, (4096, 4096, 1): 8, (28672, 4096, 2): 4, (4096, 14336, 1): 2, (128256, 4096, 1): 8}
    for (out, width, tiles), rows in table.items():
        launch = module._launch_of(out, width // 8, tiles, H200)
        assert launch is not None and launch.rows == rows and launch.warps == 4, (out, width)


def test_int4_of_one_token_goes_to_the_matrix_units(device: torch.device) -> None:
    """Except in groups of 32, and with float32."""
    expected = {"int8": True, "fp8": True, "int4-g128": False, "int4-g64": False, "int4-g32": True}
    for name, is_best in expected.items():
        weight = checked(fused.pack(quantized_as(name, random(8, 256, seed=1))))  # type: ignore[arg-type]
        assert module.is_best(weight, 1, torch.bfloat16) is is_best
        assert module.is_best(weight, 1, torch.float32)


def test_invalid_arguments_are_refused(device: torch.device, guarded: GuardedMemory) -> None:
    case = Case(SHAPES[SMALL], 3, torch.float32, device, guarded)
    quantize_case(case, "int8")
    w13 = checked(fused.pack(case.w13))  # type: ignore[arg-type]
    assert isinstance(case.w13, QuantizedWeight)
    refusals = {
        "one token, x (1, IN), got (3, 192)": lambda: quantized_matvec(case.h, w13),
        "few_tokens takes 1 to 16 tokens, got 18": lambda: quantized_few_tokens(case.h.repeat(6, 1), w13),
        "x must have shape (N, 192), got (3, 480)": lambda: quantized_few_tokens(case.x, w13),
        "need a weight packed by fused.pack": lambda: fused.linear_residual(case.h, case.w13, None, case.batch),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
