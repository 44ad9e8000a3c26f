"""Native projections with quantised weights, against the reference's ops with the same weights."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import native, reference
from fastllama.kernels.native import many_tokens
from fastllama.kernels.native.graph import NativeGraph
from fastllama.kernels.quantized import QuantizedWeight
from fastllama.quantization import Scheme, quantized
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory
from tests.kernels.native.quantized_cases import KINDS, guarded_copy
from tests.kernels.projection.cases import EPS, Case, Shape, assert_appended, scattered
from tests.support.tiers import parameters

CPU = torch.device("cpu")
MOST = 16  # tokens that the kernels take in these tests; more use the library's matrix product
TOKENS = (1, 2, 3, 4, 5, 9, 16, 21)
HALF_TOKENS = (1, 4, 21)
SHAPES = {
    "E64-H8-K4-D8-F172": Shape(64, 8, 4, 8, 172),  # one group of 64, and a width without groups
    "E192-H6-K2-D32-F480": Shape(192, 6, 2, 32, 480),  # a vector and a half of 4-bit numbers
    "E100-H3-K1-D20-F90": Shape(100, 3, 1, 20, 90),  # no width is a multiple of 4
    "E512-H3-K1-D64-F768": Shape(512, 3, 1, 64, 768),  # several groups of 128
}


class QuantizedCase(Case):
    """A case whose weights are quantised where their columns are whole groups."""

    def __init__(self, kind: str, shape: Shape, n_tokens: int, dtype: torch.dtype, memory: GuardedMemory) -> None:
        super().__init__(shape, n_tokens, dtype, CPU, memory, with_biases=n_tokens % 2 == 1)
        for name, weight in quantized_weights(kind, shape).items():
            setattr(self, name, guarded_copy(weight, memory))


@functools.cache
def quantized_weights(kind: str, shape: Shape) -> dict[str, QuantizedWeight]:
    """The weights of a case that can be quantised so."""
    quantize, unit = KINDS[kind]
    case = Case(shape, 1, torch.float32, CPU, GuardedMemory())
    dense = {name: getattr(case, name) for name in ("wqkv", "w13", "w2")}
    return {name: quantize(weight) for name, weight in dense.items() if weight.shape[1] % unit == 0}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", parameters(SHAPES, quick=("E100-H3-K1-D20-F90", "E512-H3-K1-D64-F768")))
def test_quantized_projections_match_reference(
    shape: Shape, kind: str, guarded: GuardedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "max_tokens", lambda dtype, **_: MOST)
    if not quantized_weights(kind, shape):
        return  # no weight of this shape has such groups
    for n_tokens, dtype in (*((n, torch.float32) for n in TOKENS), *((n, torch.bfloat16) for n in HALF_TOKENS)):
        case = QuantizedCase(kind, shape, n_tokens, dtype, guarded)
        q = native.norm_qkv_rope_append(
            case.h, case.norm, case.wqkv, case.target.rope, case.cache, EPS, case.batch, case.bqkv
        )
        for ours, expected in zip((q.flatten(1), case.cache.k, case.cache.v), case.expected_qkv(), strict=True):
            assert_appended(ours, expected)
            assert_matches("linear", ours.nan_to_num(), expected.nan_to_num())
        swiglu = native.norm_swiglu(case.h, case.norm, case.w13, EPS, case.batch, case.b13)
        assert_matches("linear", swiglu, case.expected_swiglu())
        head = native.norm_lm_head(case.h, case.norm, case.w13, EPS, case.batch)
        assert_matches("linear", head, reference.norm_lm_head(case.h, case.norm, case.w13, EPS, case.batch))
        for residual in (None, case.h):
            y = native.linear_residual(case.x, case.w2, residual, case.batch, case.b2)
            assert_matches("linear", y, case.expected_projection(residual))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", ["int8", "int8-g32", "fp8", "int4-g32", "int4-g64-zeros-bf16"])
@pytest.mark.parametrize("dtype", parameters(DTYPES, quick=("fp32", "bf16")))
def test_a_token_gets_the_same_result_in_any_batch_and_on_any_threads(
    kind: str, dtype: torch.dtype, guarded: GuardedMemory
) -> None:
    case = QuantizedCase(kind, SHAPES["E192-H6-K2-D32-F480"], 13, dtype, guarded)
    together = native.norm_swiglu(case.h, case.norm, case.w13, EPS, case.batch)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for begin, end in ((0, 1), (1, 3), (3, 6), (6, 10), (8, 13), (4, 13), (0, 13)):
                apart = native.norm_swiglu(case.h[begin:end], case.norm, case.w13, EPS, case.batch)
                assert torch.equal(apart, together[begin:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", parameters(DTYPES, quick=("fp32", "bf16")))
def test_dequantizes_like_the_contract(kind: str, dtype: torch.dtype, guarded: GuardedMemory) -> None:
    quantize, unit = KINDS[kind]
    for width in (32, 172, 192, 384):
        if width % unit == 0:
            weight = guarded_copy(quantize(random(37, width, seed=width)), guarded)
            ours, expected = many_tokens.dequantized(weight, dtype), weight.dequantized(dtype)
            # A multiplication and an addition round once or twice.
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0.0 if dtype == torch.float32 else 2**-7)


@pytest.mark.usefixtures("isa")
def test_every_fp8_value_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bit patterns but the two of NaN, subnormal ones as well."""
    bits = torch.tensor([value for value in range(256) if value & 0x7F != 0x7F], dtype=torch.uint8)[None]
    monkeypatch.setattr(native, "max_tokens", lambda dtype, **_: 256)
    weight = QuantizedWeight("fp8", bits, torch.tensor([[0.5]]))
    assert torch.equal(many_tokens.dequantized(weight, torch.float32), weight.dequantized())
    x = torch.eye(bits.shape[1])
    y = native.linear_residual(x, weight, None, scattered(254, CPU))
    assert torch.equal(y.T, weight.dequantized())


@pytest.mark.parametrize("kind", KINDS)
def test_packs_and_unpacks(kind: str) -> None:
    quantize, _ = KINDS[kind]
    parts = [quantize(random(rows, 384, seed=rows)) for rows in (5, 3, 70)]
    packed = native.pack(*parts)
    assert isinstance(packed, QuantizedWeight) and packed.shape == (78, 384)
    for ours, part in zip(native.unpack(packed, [5, 3, 70]), parts, strict=True):
        assert isinstance(ours, QuantizedWeight)
        for name in ("values", "scales", "offsets"):
            one, other = getattr(ours, name), getattr(part, name)
            assert (one is None and other is None) or torch.equal(one, other)
        assert replace(ours, values=part.values, scales=part.scales, offsets=part.offsets) == part
    (alone,) = native.unpack(native.pack(parts[0]), [5])
    assert isinstance(alone, QuantizedWeight) and torch.equal(alone.values, parts[0].values)


def test_more_tokens_than_a_product_takes_are_recorded(guarded: GuardedMemory) -> None:
    """A captured step has kernels only, for any number of rows."""
    case = QuantizedCase("int4-g32", SHAPES["E192-H6-K2-D32-F480"], 70, torch.float32, guarded)
    out: list[torch.Tensor] = []
    graph = NativeGraph()
    graph.capture(lambda: out.append(native.norm_swiglu(case.h, case.norm, case.w13, EPS, case.batch)))
    graph.replay()
    assert_matches("linear", out[0], case.expected_swiglu())


def test_a_large_weight_is_dequantized_in_parts(monkeypatch: pytest.MonkeyPatch, guarded: GuardedMemory) -> None:
    case = QuantizedCase("int8", SHAPES["E64-H8-K4-D8-F172"], 5, torch.float32, guarded)
    expected = case.expected_projection(None)
    for rows in (1, 7, 63, 64):
        monkeypatch.setattr(many_tokens, "PART_BYTES", 172 * 4 * rows)
        assert_matches("linear", many_tokens.linear(case.x, case.w2, case.b2), expected)


def test_rejects_quantized_weights_that_are_not_whole() -> None:
    batch = scattered(3, CPU)
    rows = quantized(random(64, 192), Scheme("int8"))
    groups = quantized(random(64, 192), Scheme("int4", 64))
    assert groups.offsets is not None
    x = random(3, 192)
    refusals = {
        "got 'int3' in 'plain'": replace(rows, format="int3"),
        "got 'int8' in 'fused'": replace(rows, order="fused"),
        "weight.values must have shape (rows, 192), got (64, 191)": replace(rows, values=rows.values[:, :191]),
        "weight.values must be torch.int8": replace(rows, values=rows.values.view(torch.uint8)),
        "weight.values must be contiguous": replace(rows, values=rows.values.T.contiguous().T),
        "weight.scales must be float32, bfloat16 or float16": replace(rows, scales=rows.scales.double()),
        "weight.scales must have shape (64, groups), got (63, 1)": replace(rows, scales=rows.scales[:63]),
        "got int8 with offsets": replace(rows, offsets=rows.scales),
        "got int4 without": replace(groups, offsets=None),
        "weight.offsets must have shape (64, 3), got (64, 2)": replace(
            groups, offsets=groups.offsets[:, :2].contiguous()
        ),
        "got 192 columns in 2 groups": QuantizedWeight("int8", rows.values, rows.scales.half().repeat(1, 2)),
        "got 192 columns in 5 groups": QuantizedWeight("int8", rows.values, rows.scales.half().repeat(1, 5)),
        "got 192 columns in 0 groups": QuantizedWeight("int8", rows.values, rows.scales[:, :0].half().contiguous()),
    }
    linears: tuple[Callable[[QuantizedWeight], torch.Tensor], ...] = (
        lambda weight: native.linear_residual(x, weight, None, batch),
        lambda weight: many_tokens.linear(x, weight),
    )
    for message, weight in refusals.items():
        for linear in linears:
            with pytest.raises(ValueError) as caught:
                linear(weight)
            assert message in str(caught.value)
