"""Where answers part: at a near tie, or not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import Llama
from fastllama.benchmarks.near_ties import Parting, partings, possible_tokens
from fastllama.kernels.sampling.philox import uniform
from tests.support.tiny import tiny_llama


def fake(logits: list[float]) -> Any:
    """A model that has these logits everywhere, and the stop token 3."""
    model = SimpleNamespace(forward=lambda tokens, start: torch.tensor(logits)[None, None])
    return SimpleNamespace(model=model, tokenizer=SimpleNamespace(stop_tokens={3}))


GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "seeds": [1]}


def test_greedy_answers_part_at_equal_logits_only() -> None:
    near, far = fake([1.0, 2.0, 2.0 - 1e-5, 1.9999]), fake([1.0, 2.0, 1.9, 0.0])
    assert partings(near, [[5]], [[0, 1, 1]], [[0, 1, 1]], **GREEDY) == []
    assert partings(near, [[5]], [[0, 1, 1]], [[0, 2]], **GREEDY) == [Parting(0, 1, True)]
    assert partings(far, [[5]], [[0, 1, 1]], [[0, 2]], **GREEDY) == [Parting(0, 1, False)]
    assert partings(near, [[5]], [[0, 1]], [[0, 0]], **GREEDY) == [Parting(0, 1, False)], "one of both is unlikely"


def test_an_answer_that_ends_earlier_has_drawn_a_stop_token() -> None:
    assert partings(fake([1.0, 2.0, 0.0, 2.0]), [[5]], [[0, 1]], [[0]], **GREEDY) == [Parting(0, 1, True)]
    assert partings(fake([1.0, 2.0, 0.0, 1.0]), [[5]], [[0]], [[0, 1]], **GREEDY) == [Parting(0, 1, False)]


def test_draws_part_where_the_random_number_is_at_a_boundary() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    u = float(uniform(zero + 9, zero, zero, zero + 2))
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seeds": [9]}
    for share, is_near in ((u + 1e-5, True), (u - 1e-5, True), (u + 0.01, False), (u - 0.01, False)):
        logits = torch.tensor([share, 1 - share, 1e-30]).log().tolist()  # tokens above the lowest come in order of id
        assert partings(fake(logits), [[5]], [[1, 0]], [[1, 1]], **drawn) == [Parting(0, 1, is_near)]


def test_the_token_that_is_drawn_is_possible(tmp_path: Path) -> None:
    llm: Llama = tiny_llama(tmp_path)
    llm.tokenizer.stop_tokens = set()
    for seed in range(6):
        answer = llm.generate([[5, 6]], 4, 0.8, 0.9, seed=[seed])[0][0]
        for at, token in enumerate(answer):
            logits = llm.model.forward(torch.tensor([[5, 6, *answer[:at]]]), 0)[0, -1]
            zero = torch.zeros(1, dtype=torch.int64)
            u = float(uniform(zero + seed, zero, zero, zero + 2 + at))
            assert token in possible_tokens(logits, 0.8, 0.9, u)
        other = [*answer[:2], (answer[2] + 1) % llm.model.vocab_size, answer[3]]
        sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seeds": [seed]}
        assert partings(llm, [[5, 6]], [other], [answer], **sampling) == [Parting(0, 2, False)]
        assert pytest.approx(0) == len(partings(llm, [[5, 6]], [answer], [answer], **sampling))
