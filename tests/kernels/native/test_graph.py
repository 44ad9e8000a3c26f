"""Recorded native ops: a replay runs them again on what the tensors hold then."""

import functools
import weakref

import pytest
import torch

from fastllama.kernels import native
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.native.graph import NativeGraph
from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache
from tests.kernels.cases import random
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
