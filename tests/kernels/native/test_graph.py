"""Recorded native ops: a replay runs them again on what the tensors hold then."""

import pytest
import torch

from fastllama.kernels import native
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.native.graph import NativeGraph
from tests.kernels.cases import random

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
