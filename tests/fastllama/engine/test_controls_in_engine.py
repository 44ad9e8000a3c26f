"""Penalties, top-k, min-p, biases and least lengths of requests, alone and beside others, preempted or not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama, SamplingParams
from fastllama.decode_graph import Decoder
from fastllama.engine import Engine
from tests.fastllama.engine.llamas import TOLERANCE, engine_llama, logits_of
from tests.fastllama.engine.test_same_answers import AheadDecoder
from tests.support.comparisons import assert_same_logprobs
from tests.support.fake_graph import RecordedGraph

PROMPT = [5, 250, 17, 300, 41, 5]
GREEDY: dict[str, Any] = {"max_gen_len": 24, "temperature": 0.0, "logprobs": 0}
CONTROLS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.8},
    "frequency": {"frequency_penalty": 0.9},
    "bias": {"logit_bias": {569: -6.0, 8: 2.0, 100: 5.5}},
    "all": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {7: 2.0}},
}


def answer_of(engine: Engine, prompt: list[int], **params: Any) -> list[int]:
    return engine.submit(prompt, SamplingParams(**params)).result().answer.tokens


def greedy_by_hand(llm: Llama, prompt: list[int], params: SamplingParams) -> tuple[list[int], list[float], float]:
    """Tokens and log-probabilities by the definition, and the smallest margin between the best two tokens."""
    tokens, logprobs, margin = list(prompt), list[float](), 1e9
    for _ in range(params.max_gen_len or 0):
        logits = logits_of(llm, tokens)[-1]
        x, generated = logits.clone(), tokens[len(prompt) :]
        for token in set(tokens):
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        for token in set(generated):
            x[token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
        for token, bias in params.logit_bias.items():
            x[token] += bias
        best = x.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        logprobs.append(float(torch.log_softmax(logits, -1)[tokens[-1]]))
    return tokens[len(prompt) :], logprobs, margin


@pytest.mark.parametrize("name", CONTROLS)
def test_greedy_answers_are_those_by_hand(llm: Llama, name: str) -> None:
    params = SamplingParams(**GREEDY, **CONTROLS[name])
    tokens, logprobs, margin = greedy_by_hand(llm, PROMPT, params)
    assert margin > TOLERANCE, "a tie: choose another prompt"
    engine = llm.engine()
    others = [engine.submit([9, place], SamplingParams(seed=place, max_gen_len=9)) for place in range(2)]
    answer = engine.submit(PROMPT, params).result().answer
    assert answer.tokens == tokens
    assert_same_logprobs([answer.logprobs or []], [logprobs])
    assert tokens != answer_of(engine, PROMPT, **GREEDY), "the controls change this answer"
    for place, other in enumerate(others):
        assert other.result().answer.tokens == answer_of(engine, [9, place], seed=place, max_gen_len=9)


def test_repetition_is_that_of_transformers(llm: Llama) -> None:
    from tests.support.checkpoints import huggingface_model, random_weights, tiny_params

    params = tiny_params()
    oracle = huggingface_model(params, random_weights(params, seed=7))
    config = {"do_sample": False, "repetition_penalty": 1.5, "max_new_tokens": 24, "eos_token_id": None}
    expected = oracle.generate(torch.tensor([PROMPT]), pad_token_id=0, **config)[0, len(PROMPT) :].tolist()
    assert answer_of(llm.engine(), PROMPT, **GREEDY, repetition_penalty=1.5) == expected


def test_a_large_bias_forces_a_token_and_a_low_one_forbids_it(llm: Llama) -> None:
    engine = llm.engine()
    assert answer_of(engine, PROMPT, seed=1, max_gen_len=5, logit_bias={77: 100}) == [77] * 5
    plain = answer_of(engine, PROMPT, **GREEDY)
    forbidden = answer_of(engine, PROMPT, **GREEDY, logit_bias={plain[0]: -100})
    assert plain[0] not in forbidden


def test_top_k_one_is_greedy_and_min_p_one_too(llm: Llama) -> None:
    engine = llm.engine()
    plain = answer_of(engine, PROMPT, **GREEDY)
    drawn = {**GREEDY, "temperature": 1.5, "top_p": 1.0, "seed": 4}
    assert answer_of(engine, PROMPT, **drawn, top_k=1) == plain
    assert answer_of(engine, PROMPT, **drawn, min_p=1.0) == plain
    assert answer_of(engine, PROMPT, **drawn) != plain


@pytest.mark.parametrize("given", [{"top_k": 3}, {"min_p": 0.3}], ids=str)
def test_draws_stay_among_the_likely_tokens(llm: Llama, given: dict[str, Any]) -> None:
    temperature = 1.3
    params = SamplingParams(max_gen_len=40, temperature=temperature, top_p=1.0, seed=6, **given)
    tokens = PROMPT + llm.engine().submit(PROMPT, params).result().answer.tokens
    logits = logits_of(llm, tokens)
    ranks, kept = [], True
    for place in range(len(PROMPT) - 1, len(tokens) - 1):
        x = logits[place]
        chosen = x[tokens[place + 1]]
        ranks.append(int((x > chosen).sum()))
        share = torch.exp((chosen - x.max()) / temperature)
        kept &= ranks[-1] < 3 if params.top_k else bool(share > 0.3 - 1e-3)
    assert kept and max(ranks) > 0


def test_no_stop_token_comes_before_min_tokens(llm: Llama) -> None:
    engine = llm.engine()
    plain = answer_of(engine, PROMPT, **GREEDY)
    stops: dict[str, Any] = {"stop_token_ids": plain[:3]}
    assert answer_of(engine, PROMPT, **GREEDY, **stops) == []
    forced = engine.submit(PROMPT, SamplingParams(**GREEDY, **stops, min_tokens=10)).result().answer
    assert len(forced.tokens) >= 10 and not set(forced.tokens) & set(plain[:3])
    exact: dict[str, Any] = {
        "max_gen_len": 30,
        "seed": 1,
        "logit_bias": {3: 100.0},
        "stop_token_ids": [3],
        "min_tokens": 7,
    }
    answer = engine.submit(PROMPT, SamplingParams(**exact)).result().answer
    assert len(answer.tokens) == 7 and (answer.finish_reason, answer.stop_reason) == ("stop", 3)


def test_the_tokenizers_stop_tokens_end_an_answer_unless_they_are_ignored(llm: Llama) -> None:
    engine = llm.engine()
    plain = answer_of(engine, PROMPT, **GREEDY)
    llm.tokenizer.stop_tokens = {plain[4]}
    at = plain.index(plain[4])
    assert answer_of(engine, PROMPT, **GREEDY) == plain[:at]
    assert answer_of(engine, PROMPT, **GREEDY, ignore_eos=True) == plain
    ended = answer_of(engine, PROMPT, **GREEDY, ignore_eos=True, stop_token_ids=[plain[2]])
    assert ended == plain[: plain.index(plain[2])]


DECODERS: dict[str, Any] = {
    "as-built": None,
    "ahead": lambda llm: AheadDecoder(llm.model),
    "graphs-ahead": lambda llm: AheadDecoder(llm.model, new_graph=RecordedGraph),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_controls_survive_preemption_and_any_company(tmp_path: Path, kind: str) -> None:
    """Each request's answer in a full small cache is the one that it gets with the engine for itself."""
    llm = engine_llama(tmp_path, backend="reference", cache_tokens=5 * 64)
    alone = llm.decoder
    if DECODERS[kind]:
        llm.decoder = DECODERS[kind](llm)
    asked: list[tuple[list[int], SamplingParams]] = []
    for number in range(7):
        least = {"min_tokens": 45, "stop_token_ids": range(576 // 2)}
        given: dict[str, Any] = [*CONTROLS.values()][-1 - number // 2] if number % 2 else least
        draws: dict[str, Any] = {
            "temperature": 0.9,
            "top_p": 1.0,
            "seed": number,
            "logprobs": number % 3,
            "max_gen_len": 80,
        }
        prompt = [(number * 31 + place) % 320 for place in range(50 + 3 * number)]
        asked.append((prompt, SamplingParams(**draws, **given)))
    engine = llm.engine()
    requests = [engine.submit(*one) for one in asked]
    engine.run()
    assert engine.stats.preemptions > 0
    llm.decoder = alone
    assert isinstance(alone, Decoder)
    for request, (prompt, params) in zip(requests, asked, strict=True):
        llm.model.cache.pool.forget()
        answer, expected = request.result().answer, llm.engine().submit(prompt, params).result().answer
        assert answer.tokens == expected.tokens
        assert_same_logprobs([answer.logprobs or []], [expected.logprobs or []])
        for found, wanted in zip(answer.top_logprobs or [], expected.top_logprobs or [], strict=True):
            assert [token for token, _ in found] == [token for token, _ in wanted]


def test_answers_of_one_seed_are_different_streams(llm: Llama) -> None:
    engine = llm.engine()
    params: dict[str, Any] = {"max_gen_len": 16, "temperature": 1.0, "seed": 9}
    several = engine.submit(PROMPT, SamplingParams(**params, n=5)).result().answers
    assert len({tuple(answer.tokens) for answer in several}) == 5
    assert [answer.index for answer in several] == list(range(5))
    again = engine.submit(PROMPT, SamplingParams(**params, n=2)).result().answers
    assert [answer.tokens for answer in again] == [answer.tokens for answer in several[:2]]
    rows, _ = llm.generate([PROMPT] * 4, 16, temperature=1.0, seed=9)
    assert rows == [answer.tokens for answer in several[:4]], "answer i draws as row i of generate"
    unseeded = [answer_of(engine, PROMPT, max_gen_len=16, temperature=1.0) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
