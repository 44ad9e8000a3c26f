"""Tokens drawn with a draft model have the distribution of Meta's rule, chi-square, and are those drawn without it."""

from pathlib import Path
from typing import Any

import torch

from fastllama import Llama
from tests.kernels.sampling.draws import assert_follows, metas_distribution
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

ROWS, CALLS, LENGTH = 64, 40, 5
PROMPT = [5, 6, 7, 5, 6]
TEMPERATURE, TOP_P = 0.7, 0.45  # a few tokens at each place
NOISE = 0.02  # of the draft model's weights, relative to the target's


def build(folder: Path, draft: Path | None) -> Llama:
    sizes: dict[str, Any] = {"max_seq_len": 16, "max_batch_size": ROWS}
    llm = Llama.build(
        str(folder), None, **sizes, device="cpu", draft=draft and str(draft), n_guesses=3 if draft else "auto"
    )
    llm.tokenizer.stop_tokens = set()
    return llm


def distribution(llm: Llama) -> dict[tuple[int, ...], float]:
    """The probability of each answer of LENGTH tokens, from the logits of complete passes and Meta's rule."""
    answers: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer: dict[tuple[int, ...], float] = {}
        known = list(answers)
        for first in range(0, len(known), ROWS):
            part = known[first : first + ROWS]
            logits = llm.model.forward(torch.tensor([[*PROMPT, *answer] for answer in part]), 0)[:, -1]
            for answer, row in zip(part, logits, strict=True):
                probs = metas_distribution(row, TEMPERATURE, TOP_P)
                for token in probs.nonzero()[:, 0].tolist():
                    longer[*answer, token] = answers[answer] * float(probs[token])
        answers = longer
    return answers


def test_draws_with_a_draft_model_follow_metas_rule(tmp_path: Path) -> None:
    fields = tiny_params()
    weights = random_weights(fields, seed=7)
    random = torch.Generator().manual_seed(1)
    noisy = {
        name: weight + NOISE * weight.std() * torch.randn(weight.shape, generator=random) if weight.ndim > 1 else weight
        for name, weight in weights.items()
    }
    for name, one in (("target", weights), ("draft", noisy)):
        write_meta(tmp_path / name, fields, one)
        write_tokenizer(tmp_path / name)
    plain, llm = build(tmp_path / "target", None), build(tmp_path / "target", tmp_path / "draft")
    expected = distribution(plain)
    places = {answer: place for place, answer in enumerate(expected)}
    counts = torch.zeros(len(places))
    for call in range(CALLS):
        seeds = [ROWS * call + row for row in range(ROWS)]
        drawn = llm.generate([PROMPT] * ROWS, LENGTH, TEMPERATURE, TOP_P, seed=seeds)[0]
        for row in drawn:
            counts[places[tuple(row)]] += 1
        if call < 3:
            assert drawn == plain.generate([PROMPT] * ROWS, LENGTH, TEMPERATURE, TOP_P, seed=seeds)[0]
    stats = llm.speculation
    assert stats is not None and min(stats.accepted, stats.steps - stats.accepted) > 2000, "right and wrong guesses"
    assert len(expected) > 30
    assert_follows(counts, torch.tensor(list(expected.values()), dtype=torch.float64))
