"""Tiny models for tests of the engine, and what each request gives alone."""

from pathlib import Path
from typing import Any

import torch

from fastllama import Llama, SamplingParams
from fastllama.benchmarks.tolerances import TOLERANCES
from fastllama.engine import Result
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.reference import sample
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

MAX_SEQ_LEN = 256
ROWS = 4
VOCABULARY = 576
TOLERANCE = TOLERANCES["logits", torch.float32]
TRIALS = 200  # of logits within the tolerance


def engine_llama(
    folder: Path,
    *,
    backend: str | None = None,
    max_seq_len: int = MAX_SEQ_LEN,
    rows: int = ROWS,
    cache_tokens: int | None = None,
    **params: Any,
) -> Llama:
    """A Llama with random weights, and no stop tokens of the tokenizer's."""
    fields = tiny_params(**params)
    write_meta(folder, fields, random_weights(fields, seed=7))
    tokenizer = write_tokenizer(folder)
    sizes = max_seq_len, rows
    llm = Llama.build(
        str(folder), str(tokenizer), *sizes, seed=1, device="cpu", backend=backend, cache_tokens=cache_tokens
    )
    llm.tokenizer.stop_tokens = set()
    return llm


def logits_of(llm: Llama, tokens: list[int]) -> torch.Tensor:
    """The logits (S, V) of each position, from the model's own forward pass."""
    return llm.model.forward(torch.tensor([tokens]), 0)[0]


def answer_alone(llm: Llama, prompt: list[int], params: SamplingParams) -> tuple[list[int], list[float]]:
    """The tokens and log-probabilities that `generate` gives for a request's first answer."""
    stops = llm.tokenizer.stop_tokens
    llm.tokenizer.stop_tokens = set(params.stop_token_ids) | (set() if params.ignore_eos else stops)
    try:
        length = llm.model.params.max_seq_len if params.max_gen_len is None else params.max_gen_len
        assert params.seed is not None
        tokens, scores = llm.generate(
            [prompt], length, params.temperature, params.top_p, logprobs=True, seed=[params.seed]
        )
    finally:
        llm.tokenizer.stop_tokens = stops
    assert scores is not None
    return tokens[0], scores[0]


def is_near_tie(llm: Llama, context: list[int], ours: int, expected: int, params: SamplingParams) -> bool:
    """Whether logits within the tolerance of the model's give both tokens."""
    logits = logits_of(llm, context)[-1]
    noise = (torch.rand(TRIALS, len(logits), generator=torch.Generator().manual_seed(0)) * 2 - 1) * TOLERANCE
    streams = [(params.seed or 0, 0, 0)] * TRIALS
    sampling = SamplingTensors.of(params.temperature, params.top_p, streams, torch.device("cpu"))
    found, _ = sample(logits + noise, sampling, torch.full((TRIALS,), len(context)))
    return {ours, expected} <= set(found.tolist())


def assert_as_alone(llm: Llama, result: Result, params: SamplingParams) -> bool:
    """Assert that a request's first answer is the one that it gets alone -> whether they part at a near-tie."""
    tokens, logprobs = answer_alone(llm, result.prompt_tokens, params)
    ours = result.answer.tokens
    same = next((at for at, pair in enumerate(zip(ours, tokens, strict=False)) if pair[0] != pair[1]), None)
    if same is None:
        assert ours == tokens
    else:
        context = result.prompt_tokens + tokens[:same]
        assert is_near_tie(llm, context, ours[same], tokens[same], params), (same, ours, tokens)
    count = len(tokens) if same is None else same
    found, expected = torch.tensor((result.answer.logprobs or [])[:count]), torch.tensor(logprobs[:count])
    torch.testing.assert_close(found, expected, atol=TOLERANCES["logprobs", torch.float32], rtol=0)
    return same is not None
