"""llama.cpp as a peer."""

import dataclasses
import importlib.util
from typing import Any, cast

import numpy as np
import pytest
import torch

from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.peers import llama_cpp
from fastllama.benchmarks.peers.agreement import compare
from fastllama.benchmarks.peers.registry import PEERS, Peer, unavailable
from fastllama.benchmarks.runners import Ours
from tests.benchmarks.cases import ARGS, CPU, RAGGED, SHAPE, SOURCE, SPEC

MISSING = [name for name in PEERS["llama.cpp"].packages if importlib.util.find_spec(name) is None]
needs_llama_cpp = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")
SCALED_AND_TIED: dict[str, Any] = {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "tied_output": True}
WIDE_HEADS: dict[str, Any] = {"head_dim": 16}


class FakeContext:
    """Predicts the sum of a row's newest tokens, and records its calls."""

    device = CPU

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def clear(self) -> None:
        self.calls.append("clear")

    def decode(self, tokens: list[list[int]], starts: list[int]) -> list[np.ndarray]:
        self.calls.append((tokens, starts))
        return [np.eye(16, dtype=np.float32)[sum(row)] for row in tokens]


def test_generate_appends_each_rows_token_at_its_position() -> None:
    context = FakeContext()
    run = llama_cpp.generate(cast(llama_cpp.Context, context), [[1, 2, 3], [4]], 3, with_logprobs=True)
    assert context.calls == ["clear", ([[1, 2, 3], [4]], [0, 0]), ([[6], [4]], [3, 1]), ([[6], [4]], [4, 2])]
    assert run.tokens == [[6, 6, 6], [4, 4, 4]] and len(run.seconds) == 3
    assert run.margins == [[1.0] * 3] * 2


def test_unavailable_names_the_projects_and_the_limit_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert str(unavailable("llama.cpp", ARGS)).endswith("pip install llama-cpp-python gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert unavailable("llama.cpp", ARGS) is None
    assert "at most 256 rows" in str(unavailable("llama.cpp", dataclasses.replace(ARGS, max_batch_size=257)))


@needs_llama_cpp
@pytest.mark.parametrize("fields", [{}, SCALED_AND_TIED, WIDE_HEADS], ids=["plain", "scaled-tied", "wide-heads"])
def test_llama_cpp_generates_our_tokens_for_ragged_prompts(fields: dict[str, Any]) -> None:
    spec = dataclasses.replace(SPEC, source=dataclasses.replace(SOURCE, shape={**SHAPE, **fields}))
    assert_agrees(spec)


@needs_llama_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_llama_cpp_agrees_in_half_precision(dtype: torch.dtype) -> None:
    assert_agrees(dataclasses.replace(SPEC, dtype=dtype))


def assert_agrees(spec: ModelSpec) -> None:
    prompts = RAGGED.prompts(ARGS.vocab_size)
    ours = Ours(spec.build()).run(prompts, 8, logprobs=True)
    with Peer("llama.cpp", spec) as peer:
        expected = peer.run(prompts, 8, logprobs=True)
        again = peer.run(prompts, 8)
    agreement = compare(ours, expected, spec.dtype)
    assert agreement.agrees, agreement.difference
    assert again.tokens == expected.tokens and len(again.seconds) == 8 and again.seconds == sorted(again.seconds)
