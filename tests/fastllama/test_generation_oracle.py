"""Greedy tokens and log-probabilities of the complete model against Meta's and Hugging Face's models, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama
from tests.support.checkpoints import (
    huggingface_model,
    random_weights,
    tiny_params,
    write_huggingface,
    write_meta,
    write_tokenizer,
)
from tests.support.comparisons import assert_same_logits, assert_same_logprobs
from tests.support.oracle import meta_generate, meta_transformer

MAX_SEQ_LEN = 64
MAX_GEN_LEN = 24
PROMPTS = [[5, 250, 17, 300, 41], [9], [101, 3, 77, 512, 8, 19, 260, 44, 91, 200, 15], [31, 32]]

META_CASES: dict[str, dict[str, Any]] = {
    "H8-K2-G4": {},
    "H6-K3-G2": {"dim": 48, "n_heads": 6, "n_kv_heads": 3, "multiple_of": 24},
    "H6-K2-G3": {"dim": 96, "n_heads": 6, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3},
    "H4-K4-mha": {"n_heads": 4, "n_kv_heads": 4, "multiple_of": 24},
    "H8-K1-mqa": {"n_heads": 8, "n_kv_heads": 1, "rope_theta": 10000.0},
    "kv-heads-unset": {"n_kv_heads": None},
    "scaled-rope": {"use_scaled_rope": True},
}
SHARDS = {"H8-K2-G4": (1, 2, 4), "H6-K3-G2": (1, 3), "H4-K4-mha": (2, 4)}
MODELS_AND_SHARDS = [(name, shards) for name in META_CASES for shards in SHARDS.get(name, (1,))]


def assert_same(llm: Llama, expected: list[tuple[list[int], list[float], list[float]]]) -> None:
    """Assert that greedy generation of PROMPTS, with and without echo, gives these (tokens, scores, prompt scores)."""
    tokens, logprobs = llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0, logprobs=True)
    echoed, echoed_logprobs = llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0, logprobs=True, echo=True)
    assert logprobs is not None and echoed_logprobs is not None
    for row, (generated, scores, prompt_scores) in enumerate(expected):
        assert tokens[row] == generated
        assert echoed[row] == PROMPTS[row] + generated
        assert_same_logprobs([logprobs[row], echoed_logprobs[row]], [scores, prompt_scores + scores])
        assert echoed_logprobs[row][0] == 0.0


@pytest.mark.parametrize(("case", "shards"), MODELS_AND_SHARDS, ids=[f"{name}-S{n}" for name, n in MODELS_AND_SHARDS])
def test_generate_matches_metas_transformer(tmp_path: Path, case: str, shards: int) -> None:
    params = tiny_params(**META_CASES[case])
    weights = random_weights(params, seed=3)
    write_meta(tmp_path, params, weights, shards=shards)
    llm = Llama.build(str(tmp_path), str(write_tokenizer(tmp_path)), MAX_SEQ_LEN, len(PROMPTS), device="cpu")
    llm.tokenizer.stop_tokens = set()
    oracle = meta_transformer(params, weights, MAX_SEQ_LEN)
    assert_same(llm, [meta_generate(oracle, prompt, MAX_GEN_LEN, MAX_SEQ_LEN) for prompt in PROMPTS])


def test_forward_matches_metas_transformer_prefill_continuation_and_decode(tmp_path: Path) -> None:
    params = tiny_params()
    weights = random_weights(params, seed=4)
    write_meta(tmp_path, params, weights)
    llm = Llama.build(str(tmp_path), str(write_tokenizer(tmp_path)), MAX_SEQ_LEN, 3, device="cpu")
    oracle = meta_transformer(params, weights, MAX_SEQ_LEN, max_batch_size=3)
    tokens = torch.randint(0, params["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(1))
    for start, end in ((0, 13), (13, 14), (14, 31), (31, 32), (32, 40), (5, 9)):
        ours, theirs = llm.model.forward(tokens[:, start:end], start), oracle.forward(tokens[:, start:end], start)
        assert ours.dtype == torch.float32 and ours.shape == (3, end - start, params["vocab_size"])
        assert_same_logits(ours, theirs.float())


HUGGINGFACE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-old-fields": {"old_fields": True},
    "scaled8": {"params": {"use_scaled_rope": True, "rope_scaling_factor": 8.0, "rope_original_max_seq_len": 32}},
    "scaled8-old-fields": {"params": {"use_scaled_rope": True, "rope_scaling_factor": 8.0}, "old_fields": True},
    "scaled32-tied": {"params": {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "tied_output": True}},
    "sharded": {"max_shard_size": 60_000},
    "head-dim-of-its-own": {"params": {"head_dim": 16, "hidden_dim": 72}},
}


@pytest.mark.parametrize("case", HUGGINGFACE_CASES)
def test_generate_matches_transformers(tmp_path: Path, case: str) -> None:
    options = dict(HUGGINGFACE_CASES[case])
    params = tiny_params(**options.pop("params", {}))
    weights = random_weights(params, seed=5)
    write_huggingface(tmp_path, params, weights, **options)
    llm = Llama.build(str(tmp_path), str(write_tokenizer(tmp_path)), MAX_SEQ_LEN, len(PROMPTS), device="cpu")
    llm.tokenizer.stop_tokens = set()
    model = huggingface_model(params, weights)
    assert_same(llm, [_huggingface_generate(model, prompt) for prompt in PROMPTS])


@torch.inference_mode()
def _huggingface_generate(model: Any, prompt: list[int]) -> tuple[list[int], list[float], list[float]]:
    tokens = list(prompt)
    scores = torch.empty(0)
    for _ in range(min(MAX_GEN_LEN, MAX_SEQ_LEN - len(prompt))):
        scores = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
        tokens.append(int(scores[-1].argmax()))
    scores = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    logprobs = [0.0] + [scores[place, token].item() for place, token in enumerate(tokens[1:])]
    return tokens[len(prompt) :], logprobs[len(prompt) :], logprobs[: len(prompt)]


def test_stop_tokens_end_rows_where_metas_loop_does(tmp_path: Path) -> None:
    params = tiny_params()
    weights = random_weights(params, seed=6)
    write_meta(tmp_path, params, weights)
    llm = Llama.build(str(tmp_path), str(write_tokenizer(tmp_path)), MAX_SEQ_LEN, len(PROMPTS), device="cpu")
    oracle = meta_transformer(params, weights, MAX_SEQ_LEN)
    free = [meta_generate(oracle, prompt, MAX_GEN_LEN, MAX_SEQ_LEN)[0] for prompt in PROMPTS]
    stops = {free[0][4], free[1][0], free[2][9]}  # one row stops at its first token, one never
    llm.tokenizer.stop_tokens = stops
    expected = [meta_generate(oracle, prompt, MAX_GEN_LEN, MAX_SEQ_LEN, tuple(stops)) for prompt in PROMPTS]
    tokens, logprobs = llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0, logprobs=True)
    assert tokens == [row[0] for row in expected] and tokens[1] == []
    assert logprobs is not None and [len(row) for row in logprobs] == [len(row) for row in tokens]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_float32(tmp_path: Path, dtype: str) -> None:
    """Log-probabilities match always; tokens match if float32's two best differ by more than the tolerance."""
    tolerance = {"bfloat16": 0.25, "float16": 0.05}[dtype]
    params = tiny_params()
    weights = random_weights(params, seed=8)
    write_meta(tmp_path, params, weights)
    llm = Llama.build(str(tmp_path), str(write_tokenizer(tmp_path)), MAX_SEQ_LEN, 4, device="cpu", dtype=dtype)
    oracle = meta_transformer(params, weights, MAX_SEQ_LEN, max_batch_size=1)
    llm.tokenizer.stop_tokens = set()
    compared = 0
    for prompt in PROMPTS:
        (tokens,), scores = llm.generate([prompt], MAX_GEN_LEN, temperature=0, logprobs=True)
        assert scores is not None
        reference = torch.log_softmax(oracle.forward(torch.tensor([prompt + tokens]), 0)[0].float(), -1)
        for step, (token, score) in enumerate(zip(tokens, scores[0], strict=True)):
            row = reference[len(prompt) + step - 1]
            assert abs(row[token].item() - score) < tolerance
            best = row.topk(2).values
            if best[0] - best[1] > 2 * tolerance:
                assert token == int(row.argmax())
                compared += 1
    assert compared > 10
