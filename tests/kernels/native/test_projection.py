"""The native projections, against the reference's ops."""

from dataclasses import replace

import pytest
import torch

from fastllama.benchmarks.tolerances import assert_matches
from fastllama.kernels import native, reference
from tests.kernels.cases import DTYPES
from tests.kernels.guards import GuardedMemory
from tests.kernels.native.pages import NO_PAGES, no_page
from tests.kernels.projection.cases import EPS, SHAPES, Case, Shape, assert_appended, outside
from tests.support.tiers import parameters

CPU = torch.device("cpu")
TOKENS = (1, 2, 3, 5, 6, 7, 11, 16)
MOST = 16  # tokens that the kernels take in these tests; MANY use the library's matrix product
MANY = 21


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("with_biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", parameters(SHAPES, quick=("E192-H6-K2-D32-F480", "E100-H3-K1-D20-F90")))
def test_projections_match_reference(
    shape: Shape, dtype: torch.dtype, with_biases: bool, guarded: GuardedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "max_tokens", lambda dtype, **_: MOST)
    for n_tokens in (*TOKENS, MANY):
        case = Case(shape, n_tokens, dtype, CPU, guarded, with_biases=with_biases)
        q = native.norm_qkv_rope_append(
            case.h, case.norm, case.wqkv, case.target.rope, case.cache, EPS, case.batch, case.bqkv
        )
        for ours, expected in zip((q.flatten(1), case.cache.k, case.cache.v), case.expected_qkv(), strict=True):
            assert_appended(ours, expected)
            assert_matches("linear", ours.nan_to_num(), expected.nan_to_num())
        swiglu = native.norm_swiglu(case.h, case.norm, case.w13, EPS, case.batch, case.b13)
        assert_matches("linear", swiglu, case.expected_swiglu())
        head = native.norm_lm_head(case.h, case.norm, case.w13, EPS, case.batch)
        assert_matches(
            "linear", head, reference.norm_lm_head(case.h, case.norm, reference.pack(case.w13), EPS, case.batch)
        )
        for residual in (None, case.h):
            y = native.linear_residual(case.x, case.w2, residual, case.batch, case.b2)
            assert_matches("linear", y, case.expected_projection(residual))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_token_gets_the_same_result_in_any_batch_and_on_any_threads(
    dtype: torch.dtype, guarded: GuardedMemory
) -> None:
    case = Case(SHAPES["E100-H3-K1-D20-F90"], 13, dtype, CPU, guarded)
    together = native.norm_swiglu(case.h, case.norm, case.w13, EPS, case.batch)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for begin, end in ((0, 1), (1, 4), (4, 13), (0, 13)):
                apart = native.norm_swiglu(case.h[begin:end], case.norm, case.w13, EPS, case.batch)
                assert torch.equal(apart, together[begin:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("isa")
def test_many_tokens_are_several_ops(monkeypatch: pytest.MonkeyPatch, guarded: GuardedMemory) -> None:
    monkeypatch.setattr(native, "MAX_TOKENS_PER_OP", 5)
    for n_tokens in (4, 5, 6, 10, 13):
        case = Case(SHAPES["E100-H3-K1-D20-F90"], n_tokens, torch.float32, CPU, guarded)
        q = native.norm_qkv_rope_append(case.h, case.norm, case.wqkv, case.target.rope, case.cache, EPS, case.batch)
        for ours, expected in zip((q.flatten(1), case.cache.k, case.cache.v), case.expected_qkv(), strict=True):
            assert_appended(ours, expected)
            assert_matches("linear", ours.nan_to_num(), expected.nan_to_num())
        y = native.linear_residual(case.x, case.w2, case.h, case.batch)
        assert_matches("linear", y, case.expected_projection(case.h))


@pytest.mark.usefixtures("isa", "threads")
def test_projections_append_nothing_outside_the_cache(guarded: GuardedMemory) -> None:
    case = Case(SHAPES["E64-H8-K4-D8-F172"], 4, torch.bfloat16, CPU, guarded)
    places = outside(4, CPU)
    for batch in (places, replace(places, positions=torch.zeros(4, dtype=torch.int64), rows=places.positions)):
        q = native.norm_qkv_rope_append(case.h, case.norm, case.wqkv, case.target.rope, case.cache, EPS, batch)
        assert q.isfinite().all()
    assert case.cache.k.isnan().all() and case.cache.v.isnan().all()


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("kind", NO_PAGES)
def test_projections_append_nothing_where_the_table_has_no_page(kind: str, guarded: GuardedMemory) -> None:
    """Rows 0, 2 and 3 have tokens: row 0's first page is none."""
    case = Case(SHAPES["E64-H8-K4-D8-F172"], 16, torch.float32, CPU, guarded)
    q, k, v = case.expected_qkv()
    page = int(case.cache.table[0, 0])
    assert not k[page].isnan().all()
    k[page], v[page] = torch.nan, torch.nan
    case.cache.table[0, 0] = no_page(kind, case.cache)
    ours = native.norm_qkv_rope_append(case.h, case.norm, case.wqkv, case.target.rope, case.cache, EPS, case.batch)
    for one, expected in zip((ours.flatten(1), case.cache.k, case.cache.v), (q, k, v), strict=True):
        assert_appended(one, expected)
        assert_matches("linear", one.nan_to_num(), expected.nan_to_num())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_norms_keep_digits_of_small_and_large_inputs(scale: float, guarded: GuardedMemory) -> None:
    case = Case(SHAPES["E192-H6-K2-D32-F480"], 5, torch.float16, CPU, guarded)
    case.h = guarded.copy(case.h * scale)
    ours = native.norm_swiglu(case.h, case.norm, case.w13, EPS, case.batch)
    assert_matches("linear", ours, case.expected_swiglu())


def test_projections_reject_what_does_not_belong_together(guarded: GuardedMemory) -> None:
    case = Case(SHAPES["E64-H8-K4-D8-F172"], 3, torch.float32, CPU, guarded)
    h, norm, batch = case.h, case.norm, case.batch
    cache, rope = case.cache, case.target.rope
    refusals = {
        "x must be float32, bfloat16 or float16": lambda: native.norm_lm_head(
            h.double(), norm.double(), case.w13.double(), EPS, batch
        ),
        "weight must be torch.float32": lambda: native.norm_lm_head(h, norm, case.w13.half(), EPS, batch),
        "weight must be contiguous": lambda: native.linear_residual(case.x, case.w2.T.contiguous().T, None, batch),
        "x must be on cpu, got meta": lambda: native.linear_residual(case.x.to("meta"), case.w2, None, batch),
        "bias must have shape (64), got (8)": lambda: native.linear_residual(case.x, case.w2, None, batch, norm[:8]),
        "residual must have shape (3, 64)": lambda: native.linear_residual(case.x, case.w2, h[:2], batch),
        "2·F rows together, got 343": lambda: native.norm_swiglu(h, norm, case.w13[:343], EPS, batch),
        "a multiple of 4, got 120": lambda: native.norm_qkv_rope_append(
            h, norm, case.wqkv[:120], rope, cache, EPS, batch
        ),
        "rope must hold the cache's 128 positions, got 9": lambda: native.norm_qkv_rope_append(
            h, norm, case.wqkv, rope[:9], cache, EPS, batch
        ),
        "batch.positions must have shape (2), got (3)": lambda: native.norm_qkv_rope_append(
            h[:2], norm, case.wqkv, rope, cache, EPS, batch
        ),
        "cache.table must be torch.int32": lambda: native.norm_qkv_rope_append(
            h, norm, case.wqkv, rope, cache._replace(table=cache.table.long()), EPS, batch
        ),
        "the cache must have pages, positions, kv heads and an even head dim, got (P, T, K, D) = (9, 0, 4, 8)": (
            lambda: native.norm_qkv_rope_append(
                h, norm, case.wqkv, rope, cache._replace(table=cache.table[:, :0]), EPS, batch
            )
        ),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
