"""Log-probabilities of answers and prompts, with alternatives, against the logits of the model's forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama, SamplingParams
from fastllama.engine import Result, model_runner
from fastllama.token_scores import TokenScore, score_tokens
from tests.fastllama.engine.llamas import TOLERANCE, engine_llama, logits_of

PROMPT = [(11 * place + 3) % 320 for place in range(140)]


def assert_scores(found: list[float], tokens: list[int], logits: torch.Tensor, first: int) -> None:
    """Assert that these are the log-probabilities of tokens[first:]."""
    expected = torch.log_softmax(logits, -1)[first - 1 : len(tokens) - 1].gather(
        1, torch.tensor(tokens[first:])[:, None]
    )
    torch.testing.assert_close(torch.tensor(found), expected[:, 0], atol=TOLERANCE, rtol=0)


def assert_alternatives(found: list[list[tuple[int, float]]], logits: torch.Tensor, count: int) -> None:
    expected = torch.log_softmax(logits, -1).topk(count)
    assert len(found) == len(logits)
    for top, values in zip(found, expected.values, strict=True):
        torch.testing.assert_close(torch.tensor([value for _, value in top]), values, atol=TOLERANCE, rtol=0)
    ids = [[token for token, _ in top] for top in found]
    assert sum(one != two for one, two in zip(ids, expected.indices.tolist(), strict=True)) == 0


def answered(llm: Llama, **params: object) -> Result:
    given = {"max_gen_len": 10, "temperature": 1.0, "seed": 3, **params}
    return llm.engine().submit(PROMPT, SamplingParams(**given)).result()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "controls", [{}, {"logit_bias": {7: 4.0}, "frequency_penalty": 1.0}], ids=["plain", "controls"]
)
def test_answers_have_the_models_log_probabilities(llm: Llama, controls: dict[str, object]) -> None:
    answer = answered(llm, logprobs=4, **controls).answer
    tokens = PROMPT + answer.tokens
    logits = logits_of(llm, tokens)
    assert answer.logprobs is not None and answer.top_logprobs is not None
    assert_scores(answer.logprobs, tokens, logits, len(PROMPT))
    assert_alternatives(answer.top_logprobs, logits[len(PROMPT) - 1 : -1], 4)


def test_nothing_is_returned_that_was_not_asked_for(llm: Llama) -> None:
    result = answered(llm)
    assert result.prompt_scores is None and result.answer.logprobs is None and result.answer.top_logprobs is None
    result = answered(llm, logprobs=0)
    assert len(result.answer.logprobs or []) == 10 and result.answer.top_logprobs is None


@pytest.mark.parametrize("chunk", [17, 512])
def test_prompts_are_scored_with_alternatives_whatever_is_cached(llm: Llama, chunk: int) -> None:
    logits = logits_of(llm, PROMPT)
    engine = llm.engine(max_tokens_per_step=chunk)
    other = engine.submit([9], SamplingParams(max_gen_len=40, seed=1))
    for _ in range(2):
        result = engine.submit(PROMPT, SamplingParams(max_gen_len=1, prompt_logprobs=3)).result()
        scores = result.prompt_scores
        assert scores is not None and len(scores) == len(PROMPT) - 1
        assert_scores([score.logprob for score in scores], PROMPT, logits, 1)
        assert_alternatives([score.top for score in scores], logits[:-1], 3)
        greedy = logits[:-1].argmax(-1).tolist()
        assert [score.is_greedy for score in scores] == [a == b for a, b in zip(greedy, PROMPT[1:], strict=True)]
        assert result.cached_tokens == 0, "what is scored is computed"
    other.result()


def test_only_the_last_tokens_of_a_prompt_are_scored_after_what_is_cached(llm: Llama) -> None:
    engine = llm.engine()
    params = SamplingParams(max_gen_len=0, prompt_logprobs=0)
    logits = logits_of(llm, PROMPT)
    for cached in (0, 64):
        result = engine.submit(PROMPT, params, first_scored=100).result()
        assert result.cached_tokens == cached and result.prompt_scores is not None
        assert_scores([score.logprob for score in result.prompt_scores], PROMPT, logits, 100)
    assert engine.submit(PROMPT, params, first_scored=len(PROMPT)).result().prompt_scores == []


def test_a_prompt_of_one_token_has_no_scores(llm: Llama) -> None:
    result = llm.engine().submit([5], SamplingParams(max_gen_len=0, prompt_logprobs=2)).result()
    assert result.prompt_scores == [] and result.answer.finish_reason == "length" and result.answer.tokens == []


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_echo_returns_the_prompt_first(llm: Llama, logprobs: int | None) -> None:
    plain = answered(llm, logprobs=logprobs).answer
    request = llm.engine().submit(
        PROMPT, SamplingParams(max_gen_len=10, temperature=1.0, seed=3, echo=True, logprobs=logprobs)
    )
    increments = list(request)
    answer = request.result().answer
    assert increments[0].tokens == PROMPT and answer.tokens == PROMPT + plain.tokens
    assert answer.text == llm.tokenizer.decode(answer.tokens)
    if logprobs is None:
        assert answer.logprobs is None
        return
    logits = logits_of(llm, answer.tokens)
    assert answer.logprobs is not None and answer.logprobs[0] == 0.0
    assert_scores(answer.logprobs[1:], answer.tokens, logits, 1)
    if logprobs:
        assert answer.top_logprobs is not None and answer.top_logprobs[0] == []
        assert_alternatives(answer.top_logprobs[1:], logits[:-1], logprobs)


def test_prompts_are_scored_and_echoed_once_also_if_they_are_preempted(tmp_path: Path) -> None:
    llm = engine_llama(tmp_path, cache_tokens=6 * 64)
    engine = llm.engine(max_tokens_per_step=20)
    prompts = [[(place * (number + 2)) % 320 for place in range(100 + 9 * number)] for number in range(5)]
    params = SamplingParams(max_gen_len=90, temperature=1.0, seed=1, prompt_logprobs=0, logprobs=0, echo=True, n=2)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    engine.run()
    assert engine.stats.preemptions > 0
    for request, prompt in zip(requests, prompts, strict=True):
        scores = request.result().prompt_scores or []
        assert_scores([score.logprob for score in scores], prompt, logits_of(llm, prompt), 1)
        for answer in request.result().answers:
            assert answer.tokens[: len(prompt)] == prompt and len(answer.tokens) == len(prompt) + 90
            assert_scores((answer.logprobs or [])[1:], answer.tokens, logits_of(llm, answer.tokens), 1)


def test_several_answers_score_their_prompt_once(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []

    def counting(model: Any, h: Any, batch: Any, sources: Any, *rest: Any) -> list[TokenScore]:
        scored.append(len(sources))
        return score_tokens(model, h, batch, sources, *rest)

    monkeypatch.setattr(model_runner, "score_tokens", counting)
    params = SamplingParams(n=4, echo=True, logprobs=1, max_gen_len=3, seed=1)
    for prompt in ([5, 6, 7], [(7 * place) % 320 for place in range(100)]):
        scored.clear()
        result = llm.engine().submit(prompt, params).result()
        assert sum(scored) == len(prompt) - 1
        for answer in result.answers:
            assert answer.logprobs is not None and len(answer.logprobs) == len(answer.tokens) == len(prompt) + 3
        assert result.cached_tokens == 0


@pytest.mark.parametrize("first_scored", [0, 4, 1.5, "x"])
def test_a_first_scored_outside_the_prompt_is_refused(llm: Llama, first_scored: Any) -> None:
    with pytest.raises(ValueError, match="first_scored must be a whole number from 1 to 3"):
        llm.engine().submit([1, 2, 3], SamplingParams(prompt_logprobs=0), first_scored=first_scored)
    with pytest.raises(ValueError, match="leave one out"):
        llm.engine().submit([1, 2, 3], SamplingParams(echo=True, logprobs=0), first_scored=2)
