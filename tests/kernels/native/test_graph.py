"""Recorded native ops: a replay runs them again on what the tensors hold then."""

import functools
import weakref
from typing import Any

import pytest
import torch

from fastllama.kernels import checking, native
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.native.graph import NativeGraph
from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache
from tests.kernels.cases import random
from tests.kernels.native.checking_cases import assert_same_states
from tests.kernels.pages import shuffled_table

CPU = torch.device("cpu")


def test_a_replay_reads_the_tensors_as_they_are_then() -> None:
    x, weight, norm = random(2, 30, seed=1), random(40, 30, seed=2), random(30, seed=3)
    batch = RaggedBatch.of([(0, 0, [0, 0])], CPU)
    out: list[torch.Tensor] = []
    graph = NativeGraph()
    graph.capture(lambda: out.append(native.norm_lm_head(x, norm, weight, 1e-5, batch)))
    assert out[0].isnan().all(), "a capture runs nothing"
    for scale in (1.0, -2.0):
        x.mul_(scale)
        graph.replay()
        assert torch.equal(out[0], native.norm_lm_head(x, norm, weight, 1e-5, batch))


def test_a_replay_follows_the_page_table_as_it_is_then() -> None:
    """A step appends tokens and attends to rows, whose pages change between replays. The graph keeps the table."""
    n_heads, n_kv_heads, head_dim, width, length = 4, 2, 8, 30, 192
    h, norm, weight = random(2, width, seed=1), random(width, seed=2), random((4 + 2 * 2) * head_dim, width, seed=3)
    rope = random(length, head_dim // 2, 2, seed=4)
    shape = 7, n_kv_heads, PAGE_TOKENS, head_dim
    cache = LayerCache(random(*shape, seed=5), random(*shape, seed=6), shuffled_table(2, length))
    pages, table = (cache.k, cache.v), weakref.ref(cache.table)
    batch = RaggedBatch.of([(0, 70, [0]), (1, 63, [0])], CPU)

    def step(cache: LayerCache) -> torch.Tensor:
        q = native.norm_qkv_rope_append(h, norm, weight, rope, cache, 1e-5, batch)
        assert q.shape == (2, n_heads, head_dim)
        return native.attention(q, cache, batch)

    out: list[torch.Tensor] = []
    graph = NativeGraph()
    graph.capture(functools.partial(lambda cache: out.append(step(cache)), cache))
    del cache
    for seed, position in ((1, 63), (2, 64), (3, 128)):
        kept = table()
        assert kept is not None
        kept.copy_(shuffled_table(2, length, seed=seed))
        batch.positions[1] = position
        expected = LayerCache(pages[0].clone(), pages[1].clone(), kept.clone())
        expected_out = step(expected)
        graph.replay()
        assert torch.equal(out[0], expected_out)
        assert torch.equal(pages[0], expected.k) and torch.equal(pages[1], expected.v)


def test_a_step_that_checks_guesses_is_recorded() -> None:
    """Rows repeat themselves, so that look_up's guesses are accepted; the expected states come from torch's ops."""
    n_rows, per_row, width, vocab, length, head_dim = 3, 4, 16, 20, 128, 8
    table, norm = random(vocab, width, seed=1), random(width, seed=2)
    weights = [random(rows, width, seed=rows) / 4 for rows in (4 * head_dim, 2 * width, vocab)]
    rope = random(length, head_dim // 2, 2, seed=4)

    def fresh() -> tuple[DecodeState, LayerCache]:
        state = DecodeState.of(n_rows + 1, 9, vocab, CPU).with_guesses(length).first(n_rows)
        state.start_rows(range(n_rows), [3, 4, 5], [20, 21, 0], [21, 22, 1], [99, 30, 99])
        assert state.guesses is not None
        state.guesses.history[:, :20] = torch.arange(20) % 7
        pages = torch.zeros(2 * n_rows, 1, PAGE_TOKENS, head_dim)
        return state, LayerCache(pages, pages.clone(), shuffled_table(n_rows, length))

    def step(state: DecodeState, cache: LayerCache, ops: Any) -> torch.Tensor:
        window = ops.window(state, 0, per_row)
        batch = RaggedBatch(window.tokens, window.positions, window.rows, (), exact=False, tokens_per_row=per_row)
        h = native.embed(table, batch)
        q = native.norm_qkv_rope_append(h, norm, weights[0], rope, cache, 1e-5, batch)
        h = native.linear_residual(native.attention(q, cache, batch), weights[1][:width], h, batch)
        h = native.norm_swiglu(h, norm, weights[1], 1e-5, batch)
        logits = native.norm_lm_head(h, norm, weights[2], 1e-5, batch)
        drawn, logprobs = native.sample(logits, state.sampling, window.following)
        ops.accept(state, drawn, logprobs)
        ops.look_up(state, per_row - 1)
        return drawn

    (ours, cache), (expected, expected_cache) = fresh(), fresh()
    graph, out = NativeGraph(), []
    graph.capture(lambda: out.append(step(ours, cache, native)))
    accepted = 0
    for _ in range(30):
        before = expected.positions.clone()
        drawn = step(expected, expected_cache, checking)
        accepted += int((expected.positions - before > 1).sum())
        graph.replay()
        assert torch.equal(out[0], drawn) and torch.equal(cache.k, expected_cache.k)
        assert_same_states(ours, expected)
    assert accepted > 3 and not (expected.positions >= 0).all()


def test_more_tokens_than_a_product_takes_alone_are_recorded_too() -> None:
    x, weight, norm = random(37, 30, seed=1), random(40, 30, seed=2), random(30, seed=3)
    batch = RaggedBatch.of([(0, 0, [0] * 37)], CPU)
    out: list[torch.Tensor] = []
    graph = NativeGraph()
    graph.capture(lambda: out.append(native.norm_swiglu(x, norm, weight, 1e-5, batch)))
    graph.replay()
    torch.testing.assert_close(out[0], native.norm_swiglu(x, norm, weight, 1e-5, batch), atol=1e-5, rtol=1e-5)


def test_operations_of_torch_are_refused_and_views_are_not() -> None:
    x = random(2, 30)
    with pytest.raises(RuntimeError, match="aten::mul is not recorded: a captured step consists of native ops"):
        NativeGraph().capture(lambda: x * 2)
    with pytest.raises(RuntimeError, match="aten::zero_ is not recorded"):
        NativeGraph().capture(lambda: x.zero_())
    NativeGraph().capture(lambda: x[:1].view(30).detach())
    nested = NativeGraph()
    with pytest.raises(RuntimeError, match="a graph is being recorded on this thread"):
        nested.capture(lambda: NativeGraph().capture(lambda: None))
    assert native.silu_mul(x).isfinite().all(), "after a capture that failed, ops run"
