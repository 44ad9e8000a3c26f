"""Masks of tokens on an NVIDIA GPU: at real vocabularies, in a CUDA graph, and in an engine with queued steps."""

from pathlib import Path

import pytest
import torch

from fastllama import Llama, SamplingParams
from fastllama.engine.grammar import Grammar
from fastllama.kernels import fused
from fastllama.kernels.sampling.masks import TokenMasks, mask_logits, n_words
from fastllama.step_graphs import PLAIN, Extras
from tests.kernels.cases import DTYPES, random
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]
DEVICE = torch.device("cuda")
ROWS, LENGTH = 8, 256
WORDS = Grammar.lark("start: /[a-z]{1,7}( [a-z]{1,7}){5,40}\\./")


@pytest.fixture(autouse=True)
def nan_in_empty_memory() -> None:
    """Disable the fixture: it adds launches, and these tests run the model as users do."""


def random_masks(vocab_size: int, seed: int) -> TokenMasks:
    """Of every second row."""
    masks = TokenMasks.of(ROWS, vocab_size, DEVICE)
    words = torch.randint(-(2**31), 2**31, (ROWS, n_words(vocab_size)), generator=torch.Generator().manual_seed(seed))
    rows = range(0, ROWS, 2)
    masks.set_rows(rows, [words[row].to(torch.int32) for row in rows])
    return masks


@pytest.mark.parametrize("vocab_size", [32000, 128256, 151936, 262144])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mask_logits_replays_like_reference(dtype: torch.dtype, vocab_size: int) -> None:
    """The host changes masks and positions between replays."""
    logits = random(ROWS, vocab_size, dtype=dtype, device=DEVICE)
    masks, positions, ours = random_masks(vocab_size, 1), torch.arange(-2, ROWS - 2, device=DEVICE), logits.clone()
    fused.mask_logits(ours, masks, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.mask_logits(ours, masks, positions)
    for seed in range(3):
        for tensor, value in zip(masks.tensors, random_masks(vocab_size, seed).tensors, strict=True):
            tensor.copy_(value)
        positions.copy_(torch.arange(-seed, ROWS - seed, device=DEVICE))
        ours.copy_(logits)
        graph.replay()
        expected = logits.clone()
        mask_logits(expected, masks, positions)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("cache_tokens", [None, 320], ids=["ample", "preempting"])
def test_answers_are_those_of_each_request_alone(tmp_path: Path, cache_tokens: int | None) -> None:
    """Another batch size may decide a tie otherwise: at most one answer in twenty may differ, from some token on."""
    write_meta(tmp_path, tiny_params(), random_weights(tiny_params(), seed=3))
    files = str(tmp_path), str(write_tokenizer(tmp_path))
    llm = Llama.build(*files, LENGTH, ROWS, device="cuda", dtype="float32", cache_tokens=cache_tokens)
    llm.tokenizer.stop_tokens = set()
    asked = [
        (
            [(number * 31 + place) % 320 for place in range(40 + number)],
            SamplingParams(seed=number, max_gen_len=60, grammar=WORDS if number % 3 else None),
        )
        for number in range(20)
    ]
    engine = llm.engine()
    requests = [engine.submit(*one) for one in asked]
    engine.run()
    assert engine.stats.used_pages == 0 and (cache_tokens is None or engine.stats.preemptions > 0)
    assert {extras for _, extras, *_ in llm.decoder.graphs.captured} == {PLAIN, Extras(masks=True)}
    differing = 0
    for request, one in zip(requests, asked, strict=True):
        answer, alone = request.result().answer, llm.engine().submit(*one).result().answer
        assert answer.finish_reason in ("stop", "length") and answer.error is None
        assert one[1].grammar is None or set(answer.text) <= set("abcdefghijklmnopqrstuvwxyz .")
        differing += answer.tokens != alone.tokens
    assert differing <= 1
