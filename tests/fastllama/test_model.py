"""Transformer: loading and reading weights by Meta's names, ragged batches, chunked prefill, and errors."""

import copy
import pickle
from typing import Any

import pytest
import torch

from fastllama import ModelArgs, Transformer
from fastllama.kernels.batch import RaggedBatch
from fastllama.prefill import prefill
from fastllama.rope import rope_table
from tests.support.checkpoints import random_weights, tiny_params
from tests.support.comparisons import assert_same_logits, assert_same_logprobs


def tiny(**changes: Any) -> Transformer:
    params = tiny_params(**changes)
    model = Transformer(ModelArgs(max_batch_size=4, max_seq_len=64, **params))
    model.load_state_dict(random_weights(params, seed=2))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dict_returns_what_was_loaded(dtype: torch.dtype) -> None:
    params = tiny_params()
    weights = random_weights(params, dtype=dtype)
    model = Transformer(ModelArgs(max_batch_size=1, max_seq_len=8, **params), dtype=dtype)
    assert model.load_state_dict(weights) == ([], [])
    state = model.state_dict()
    assert list(state) == list(model.params.shapes) and set(state) == set(weights)
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    assert sum(p.numel() for p in model.parameters()) == sum(weight.numel() for weight in weights.values())


def test_loaded_weights_are_copies() -> None:
    params = tiny_params()
    weights = random_weights(params)
    model = Transformer(ModelArgs(max_batch_size=1, max_seq_len=8, **params))
    model.load_state_dict(weights)
    before = model.forward(torch.tensor([[1, 2]]), 0)
    for weight in weights.values():
        weight.zero_()
    assert_same_logits(model.forward(torch.tensor([[1, 2]]), 0), before)


def test_a_new_model_has_random_weights_and_runs() -> None:
    model = Transformer(ModelArgs(max_batch_size=1, max_seq_len=8, **tiny_params()))
    logits = model.forward(torch.tensor([[1, 2, 3]]), 0)
    assert logits.shape == (1, 3, 576) and logits.isfinite().all() and logits.std() > 0


def test_load_state_dict_lists_every_problem_and_changes_nothing() -> None:
    model = tiny()
    before = model.state_dict()
    weights = random_weights(model_params := tiny_params())
    del weights["layers.1.attention.wk.weight"], model_params
    weights["norm.weight"] = torch.ones(3)
    weights["lm_head.weight"] = torch.ones(3)
    weights["rope.freqs"] = torch.ones(4)
    with pytest.raises(ValueError) as caught:
        model.load_state_dict(weights)
    for part in (
        "missing: layers.1.attention.wk.weight",
        "unexpected: lm_head.weight",
        "norm.weight (3,) instead of (64,)",
    ):
        assert part in str(caught.value)
    assert "rope.freqs" not in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_load_state_dict_not_strict_keeps_missing_weights() -> None:
    model = tiny()
    before = model.state_dict()
    new = torch.full((16, 64), 0.5)
    outcome = model.load_state_dict({"layers.0.attention.wk.weight": new, "other": new}, strict=False)
    assert outcome.unexpected_keys == ["other"] and len(outcome.missing_keys) == len(before) - 1
    after = model.state_dict()
    assert torch.equal(after["layers.0.attention.wk.weight"], new)
    assert all(torch.equal(after[name], before[name]) for name in outcome.missing_keys)


def test_load_tensors_takes_any_order_and_refuses_wrong_names() -> None:
    params = tiny_params()
    weights = random_weights(params, seed=3)
    args = ModelArgs(max_batch_size=1, max_seq_len=8, **params)
    model = Transformer(args, init_weights=False)
    model.load_tensors(reversed(weights.items()))
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())
    empty = Transformer(args, init_weights=False)
    with pytest.raises(ValueError, match=r"no weights yet"):
        empty.state_dict()
    with pytest.raises(ValueError, match=r"19 weights are missing: .*tok_embeddings.weight"):
        empty.load_tensors([("norm.weight", weights["norm.weight"]), ("output.weight", weights["output.weight"])])
    with pytest.raises(ValueError, match=r"'norm.weight' is not in this model, or is given twice"):
        empty.load_tensors([("norm.weight", weights["norm.weight"])] * 2)
    with pytest.raises(ValueError, match=r"'norm.weight' must have shape \(64,\), got \(3,\)"):
        empty.load_tensors([("norm.weight", torch.ones(3))])


def test_tied_output_is_the_embedding() -> None:
    params = tiny_params(tied_output=True)
    weights = random_weights(params)
    model = Transformer(ModelArgs(max_batch_size=1, max_seq_len=8, **params))
    model.load_tensors((name, weight) for name, weight in weights.items() if name != "output.weight")
    assert torch.equal(model.state_dict()["output.weight"], weights["tok_embeddings.weight"])


def test_tied_output_may_be_left_out_of_a_state_dict_but_must_not_differ() -> None:
    params = tiny_params(tied_output=True)
    model = Transformer(ModelArgs(max_batch_size=1, max_seq_len=8, **params))
    weights = random_weights(params, seed=9)
    del weights["output.weight"]
    assert model.load_state_dict(weights) == ([], [])
    with pytest.raises(ValueError, match=r"output.weight differs from tok_embeddings.weight"):
        model.load_state_dict({**weights, "output.weight": torch.zeros(576, 64)})


def test_copies_and_pickles_are_the_same_model() -> None:
    model = tiny()
    tokens = torch.tensor([[5, 6, 7]])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_logits(copied.forward(tokens, 0), model.forward(tokens, 0))


def test_a_model_without_weights_raises() -> None:
    model = Transformer(ModelArgs(max_batch_size=1, max_seq_len=8, **tiny_params()), init_weights=False)
    with pytest.raises(ValueError, match="no weights yet"):
        model.forward(torch.tensor([[1]]), 0)


def test_to_the_same_device_changes_nothing() -> None:
    model = tiny()
    expected = model.forward(torch.tensor([[5, 6, 7]]), 0)[:, 2:]
    model.forward(torch.tensor([[5, 6]]), 0)
    assert model.to("cpu") is model
    assert_same_logits(model.forward(torch.tensor([[7]]), 2), expected)


def test_to_packs_the_weights_again() -> None:
    model = tiny()
    tokens = torch.tensor([[5, 6, 7]])
    expected = model.forward(tokens, 0)
    assert model.to(torch.bfloat16) is model
    assert model.dtype == model.cache.k.dtype == torch.bfloat16 and model.rope.dtype == torch.float32
    torch.testing.assert_close(model.forward(tokens, 0), expected, atol=0.3, rtol=0)
    assert model.float().forward(tokens, 0).dtype == torch.float32


def test_ragged_batch_equals_rows_one_by_one() -> None:
    """One pass continues two rows after different numbers of cached tokens and starts a third."""
    model = tiny()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 576, (n,), generator=generator).tolist() for n in (20, 9, 33)]
    pasts = [12, 8, 0]
    model.cache.assign([len(row) for row in rows])
    with torch.inference_mode():
        first = RaggedBatch.of([(row, 0, rows[row][:past]) for row, past in enumerate(pasts) if past], model.device)
        model.hidden(first)
        batch = RaggedBatch.of([(row, past, rows[row][past:]) for row, past in enumerate(pasts)], model.device)
        logits = model.logits(model.hidden(batch), batch)
        for row, segment in enumerate(batch.segments):
            expected = model.forward(torch.tensor([rows[row]]), 0)[0, pasts[row] :]
            assert_same_logits(logits[segment.begin : segment.end], expected)


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_prefill_in_chunks_equals_one_pass(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    model = tiny()
    prompts = [[3, 5, 8, 13, 21, 34, 55], [2], list(range(100, 140))]
    with torch.inference_mode():
        expected, expected_scores = prefill(model, prompts, score=True)
        monkeypatch.setattr("fastllama.prefill.PREFILL_CHUNK_TOKENS", chunk)
        monkeypatch.setattr("fastllama.token_scores.SCORE_CHUNK_TOKENS", 3)
        monkeypatch.setattr("fastllama.kernels.reference.QUERY_BLOCK_TOKENS", 4)
        logits, scores = prefill(model, prompts, score=True)
    assert_same_logits(logits, expected)
    assert_same_logprobs(scores, expected_scores)


@pytest.mark.parametrize(
    ("tokens", "start_pos", "message"),
    [
        (torch.zeros(5, 3, dtype=torch.long), 0, "5 rows do not fit the cache's max_batch_size of 4"),
        (torch.zeros(1, 3, dtype=torch.long), 62, "positions 62 to 64 do not fit the cache's max_seq_len of 64"),
        (torch.zeros(1, 3, dtype=torch.long), -1, "start_pos must be a whole number of at least 0, got -1"),
        ([[1, 2]], 0, "got list"),
        (torch.zeros(1, 3, dtype=torch.long), 0.0, "start_pos must be a whole number"),
        (torch.zeros(3, dtype=torch.long), 0, r"shape \(B, S\)"),
        (torch.zeros(1, 0, dtype=torch.long), 0, r"shape \(B, S\)"),
        (torch.zeros(1, 3), 0, "must be a tensor of integers"),
        (torch.tensor([[1, 576]]), 0, "from 0 to 575, got 576"),
        (torch.tensor([[-1, 5]]), 0, "from 0 to 575, got -1"),
    ],
)
def test_forward_rejects(tokens: Any, start_pos: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().forward(tokens, start_pos)


def test_transformer_rejects_an_unknown_vocabulary() -> None:
    with pytest.raises(ValueError, match="needs to know its vocab_size"):
        Transformer(ModelArgs(dim=8, n_layers=1, n_heads=1))


def test_rope_table_scales_wavelengths_by_the_published_rule() -> None:
    args = ModelArgs(dim=128, n_heads=1, max_seq_len=64, use_scaled_rope=True)
    plain = rope_table(ModelArgs(dim=128, n_heads=1, max_seq_len=64))
    scaled = rope_table(args)
    for pair in range(64):
        frequency = 500000.0 ** (-2 * pair / 128)
        wavelength = 2 * torch.pi / frequency
        if wavelength < 2048:
            expected = frequency
        elif wavelength > 8192:
            expected = frequency / 8
        else:
            blend = (8192 / wavelength - 1) / 3
            expected = frequency * ((1 - blend) / 8 + blend)
        angle = torch.atan2(scaled[10, pair, 1], scaled[10, pair, 0]).item() % (2 * torch.pi)
        assert angle == pytest.approx(10 * expected % (2 * torch.pi), abs=2e-5)
    assert torch.equal(scaled[:, 0], plain[:, 0]) and not torch.equal(scaled[:, -1], plain[:, -1])
