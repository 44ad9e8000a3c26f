"""Perplexity and divergence, against transformers and against the formulas in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama
from fastllama.builtin.held_out import held_out_text
from fastllama.quality import PIECE_TOKENS, check_same_windows, measure_quality, windows_of
from tests.support.checkpoints import huggingface_model, random_weights, tiny_params, write_meta, write_tokenizer

PARAMS = tiny_params(hidden_dim=192)
TEXT = "the quick brown fox jumps over the lazy dog, again and again. " * 12
WINDOW = PIECE_TOKENS + 37  # a piece and a part of one


def build(folder: Path, quantize: str | None = None, **changes: Any) -> Llama:
    params = {**PARAMS, **changes}
    if not (folder / "params.json").exists():
        write_meta(folder, params, random_weights(params, seed=2))
        write_tokenizer(folder, n_ranks=params["vocab_size"] - 256)
    return Llama.build(str(folder), None, WINDOW, 1, device="cpu", backend="reference", quantize=quantize)


def test_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    llm = build(tmp_path)
    windows = windows_of(llm.tokenizer, TEXT, WINDOW)
    assert len(windows) > 2 and {window[0] for window in windows} == {llm.tokenizer.bos_id}
    theirs = huggingface_model(PARAMS, random_weights(PARAMS, seed=2))
    loss, n_tokens = 0.0, 0
    with torch.inference_mode():
        for window in windows:
            tokens = torch.tensor([window])
            loss += float(theirs(tokens, labels=tokens).loss) * (len(window) - 1)
            n_tokens += len(window) - 1
    measured = measure_quality(llm, windows)
    assert measured.n_tokens == n_tokens == len(llm.tokenizer.encode(TEXT, bos=False, eos=False))
    assert measured.perplexity == pytest.approx(math.exp(loss / n_tokens), rel=1e-5)
    assert measured.difference is None


def test_divergence_is_that_of_the_formula(tmp_path: Path) -> None:
    llm, reference = build(tmp_path, "int4"), build(tmp_path)
    windows = windows_of(llm.tokenizer, TEXT, WINDOW, max_tokens=300)
    measured = measure_quality(llm, windows, reference)
    divergences, same, loss = [], 0, 0.0
    for window in windows:
        ours, theirs = (one.model.forward(torch.tensor([window]), 0)[0, :-1].double() for one in (llm, reference))
        p, q = theirs.softmax(-1), ours.softmax(-1)
        divergences.append((p * (p / q).log()).sum(-1))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        loss -= float(p.log()[range(len(window) - 1), window[1:]].sum())
    every, difference = torch.cat(divergences), measured.difference
    assert difference is not None and measured.n_tokens == len(every) == 300
    assert difference.mean_divergence == pytest.approx(float(every.mean()), rel=1e-3)
    assert difference.large_divergence == pytest.approx(float(every.quantile(0.99)), rel=1e-3)
    assert difference.same_top == same / 300 < 1
    assert difference.reference_perplexity == pytest.approx(math.exp(loss / 300), rel=1e-4)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    llm = build(tmp_path)
    measured = measure_quality(llm, windows_of(llm.tokenizer, TEXT, WINDOW, 50), build(tmp_path))
    difference = measured.difference
    assert difference is not None and (difference.mean_divergence, difference.same_top) == (0, 1)
    assert difference.reference_perplexity == measured.perplexity


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    llm, other = build(tmp_path / "one"), build(tmp_path / "other", vocab_size=640)
    with pytest.raises(ValueError, match="vocabularies of 576 and 640 tokens"):
        measure_quality(llm, [[1, 2, 3]], other)
    for value in (torch.nan, 1e38):
        load_output(llm, torch.full_like(llm.model.state_dict()["output.weight"], value))
        with pytest.raises(ValueError, match="logits after token 0 of a window are not finite, or beyond ±1e"):
            measure_quality(llm, [[1, 2, 3]])


def load_output(llm: Llama, weight: torch.Tensor) -> None:
    llm.model.load_state_dict(llm.model.state_dict() | {"output.weight": weight})


def test_a_text_needs_as_many_tokens_as_predict_one(tmp_path: Path) -> None:
    tokenizer = build(tmp_path).tokenizer
    (one,), two = (tokenizer.encode(text, bos=False, eos=False) for text in ("a", "a?"))
    assert windows_of(tokenizer, "a", WINDOW) == [[tokenizer.bos_id, one]]
    with pytest.raises(ValueError, match="the text has 0 tokens: expected at least 1,"):
        windows_of(tokenizer, "", WINDOW)
    tokenizer.bos_id = -1
    assert windows_of(tokenizer, "a?", WINDOW) == [two] and len(two) == 2
    with pytest.raises(ValueError, match="the text has 1 tokens: expected at least 2,"):
        windows_of(tokenizer, "a", WINDOW)


def test_the_first_difference_of_two_tokenizers_is_named() -> None:
    windows = [[0, 1, 2], [0, 3]]
    check_same_windows(windows, [[0, 1, 2], [0, 3]])
    for others, message in (
        ([[0, 1, 2], [0, 4]], "token 2 of window 2 is 3, and 4 in"),
        ([[0, 1, 2], [0, 3, 4]], "token 3 of window 2 is missing, and 4 in"),
        ([[0, 1, 2]], "token 1 of window 2 is 0, and missing in"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_windows(windows, others)


def test_the_perplexity_of_a_broken_model_is_infinite(tmp_path: Path) -> None:
    llm, reference = build(tmp_path), build(tmp_path)
    windows = windows_of(llm.tokenizer, TEXT, WINDOW, 50)
    load_output(llm, llm.model.state_dict()["output.weight"] * 1e6)
    broken = measure_quality(llm, windows, reference)
    assert broken.perplexity == math.inf and broken.difference is not None
    assert math.isfinite(broken.difference.mean_divergence) and math.isfinite(broken.difference.reference_perplexity)
    against = measure_quality(reference, windows, llm).difference
    assert against is not None and against.reference_perplexity == math.inf and math.isfinite(against.mean_divergence)


def test_the_held_out_text_is_always_the_same() -> None:
    assert held_out_text() == held_out_text() and len(held_out_text()) > 20_000
    assert len(set(held_out_text().split("\n\n"))) > 50
