"""Answers that follow grammars: always valid, the same in any company, and no cost to rows without one."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllama import Llama, SamplingParams, builtin_checkpoint
from fastllama.engine.grammar import Grammar
from tests.fastllama.engine.llamas import TOLERANCE, logits_of
from tests.support.comparisons import assert_same_logprobs

PROMPT = [5, 250, 17, 300, 41, 5]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", "é"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WORDS = Grammar.lark("start: /[a-z]{2,9}( [a-z]{2,9}){1,40}\\./")


@pytest.fixture(scope="module")
def builtin() -> Iterator[Llama]:
    yield Llama.build(*builtin_checkpoint(), max_seq_len=512, max_batch_size=8, device="cpu")


def assert_valid(text: str, schema: dict[str, Any]) -> None:
    jsonschema_rs.validate(schema, json.loads(text))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_json_follows_its_schema(builtin: Llama, temperature: float) -> None:
    engine, grammar = builtin.engine(), Grammar.json_schema(PERSON)
    asked = [
        SamplingParams(grammar=grammar, temperature=temperature, top_p=1.0, seed=seed, n=3, max_gen_len=400)
        for seed in range(6 if temperature else 1)
    ]
    dialog = [{"role": "user", "content": "Who are you?"}]
    requests = [engine.submit(dialog, one) for one in asked]  # type: ignore[arg-type]
    texts = set[str]()
    for request in requests:
        for answer in request.result().answers:
            assert answer.finish_reason == "stop" and answer.error is None
            assert_valid(answer.text, PERSON)
            texts.add(answer.text)
    assert len(texts) == (3 * len(asked) if temperature else 1)


def test_a_hot_model_cannot_write_spaces_for_ever(llm: Llama) -> None:
    """Random weights at temperature 2, where the text may always go on with a space, if a grammar lets it."""
    spaces = {token: 100.0 for token in range(576) if token < 320 and llm.tokenizer.decode([token]).isspace()}
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    params = SamplingParams(grammar=Grammar.json_schema(schema), temperature=2.0, seed=3, logit_bias=spaces)
    answer = llm.engine().submit(PROMPT, params).result().answer
    assert answer.finish_reason == "stop" and len(answer.text) > 60
    assert_valid(answer.text, schema)


SCALARS = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["x", 3, None]},
        {"type": "integer", "minimum": -3, "maximum": 40},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[a-f]{1,3}$"},
        {"const": "\u00e9\u4e2d"},
    ]
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = inner.map(lambda item: {"type": "array", "items": item, "maxItems": 2})
    objects = st.dictionaries(st.sampled_from(["k", "a b", "\u00e9"]), inner, max_size=2).map(
        lambda fields: {
            "type": "object",
            "properties": fields,
            "required": sorted(fields)[:1],
            "additionalProperties": False,
        }
    )
    return arrays | objects | st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some})


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.recursive(SCALARS, _containers, max_leaves=4), seed=st.integers(0, 99))
def test_random_schemas(llm: Llama, schema: dict[str, Any], seed: int) -> None:
    params = SamplingParams(grammar=Grammar.json_schema(schema), temperature=1.0, top_p=1.0, seed=seed, max_gen_len=240)
    answer = llm.engine().submit(PROMPT, params).result().answer
    if answer.finish_reason == "stop":
        assert_valid(answer.text, schema)
    else:
        assert answer.finish_reason == "length" and len(answer.tokens) == 240


def test_answers_end_where_the_grammar_lets_them(llm: Llama) -> None:
    """At its end, at a stop token where it may end, at the limit, or at a stop string."""
    engine, stop = llm.engine(), 97
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 5}

    def answer(grammar: Grammar, **given: Any) -> Any:
        return engine.submit(PROMPT, SamplingParams(grammar=grammar, **drawn | given)).result().answer

    digits = Grammar.lark("start: /[0-9]{3,60}/")
    ended = answer(digits)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None) and len(ended.text) == 60 == len(ended.tokens)
    ended = answer(digits, stop_token_ids=[stop], logit_bias={stop: 100.0})
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop) and len(ended.text) == 3
    ended = answer(digits, stop_token_ids=[stop], logit_bias={stop: 100.0}, min_tokens=20)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop) and len(ended.text) == 20
    ended = answer(digits, stop_token_ids=[stop], logit_bias={stop: 100.0}, min_tokens=90)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None) and len(ended.text) == 60
    ended = answer(digits, max_gen_len=7)
    assert (ended.finish_reason, ended.stop_reason) == ("length", None) and len(ended.text) == 7
    ended = answer(digits, max_gen_len=60)
    assert ended.finish_reason == "stop", "complete with the last token"
    ended = answer(digits, stop=["1", "2", "3", "4", "5"])
    assert ended.finish_reason == "stop" and ended.stop_reason in {"1", "2", "3", "4", "5"}
    assert ended.text.isdigit() or not ended.text
    ended = answer(Grammar.lark('start: ""'))
    assert (ended.finish_reason, ended.text, ended.tokens) == ("stop", "", [])
    assert answer(digits, max_gen_len=0).finish_reason == "length"


def test_the_tokenizers_stop_tokens_count_unless_they_are_ignored(llm: Llama) -> None:
    engine, grammar = llm.engine(), Grammar.lark("start: /[a-z]{4,30}/")
    given: dict[str, Any] = {"grammar": grammar, "seed": 2, "logit_bias": {331: 100.0}}
    llm.tokenizer.stop_tokens = {331}
    ended = engine.submit(PROMPT, SamplingParams(**given)).result().answer
    assert (ended.finish_reason, ended.stop_reason) == ("stop", 331) and 4 <= len(ended.text) <= 5
    ended = engine.submit(PROMPT, SamplingParams(**given, ignore_eos=True)).result().answer
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None) and len(ended.text) == 30


def test_a_grammar_that_cannot_go_on_ends_its_answer_alone(llm: Llama) -> None:
    """After `x` only a stop token has the text that the grammar wants."""
    engine = llm.engine()
    dead_end = SamplingParams(grammar=Grammar.lark('start: /[a-c]{2}/ "!"'), stop_token_ids=[ord("!")], seed=1, n=2)
    other = SamplingParams(seed=4, max_gen_len=30, logprobs=0)
    alone = engine.submit([9, 8], other).result().answer
    requests = engine.submit(PROMPT, dead_end), engine.submit([9, 8], other)
    for answer in requests[0].result().answers:
        assert answer.finish_reason == "error" and len(answer.text) == 2 and answer.text == answer.text.strip()
        assert "the grammar allows no token after" in str(answer.error) and "(33)" in str(answer.error)
    assert requests[1].result().answer == alone
    assert engine.stats.used_pages == 0


def test_a_grammar_that_does_not_fit_the_model_is_refused(llm: Llama) -> None:
    engine = llm.engine()
    with pytest.raises(ValueError, match="the grammar does not fit this model"):
        engine.submit(PROMPT, SamplingParams(grammar=Grammar.lark('start: <|nothing|> "a"')))
    assert not engine.step(), "nothing was left behind"


def test_log_probabilities_are_the_models(llm: Llama) -> None:
    """With and without controls, alternatives and other rows."""
    engine = llm.engine()
    wanted: list[dict[str, Any]] = [{}, {"frequency_penalty": 1.0}, {"logprobs": 3}, {"top_k": 2, "logprobs": 2}]
    for one in wanted:
        params = SamplingParams(grammar=WORDS, seed=7, max_gen_len=12, **{"logprobs": 0, **one})
        plain = engine.submit([3, 4], SamplingParams(seed=1, max_gen_len=20, logprobs=1))
        request = engine.submit(PROMPT, params)
        engine.run()
        answer = request.result().answer
        logits = logits_of(llm, PROMPT + answer.tokens)[len(PROMPT) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, _column(answer.tokens))[:, 0].tolist()
        assert_same_logprobs([answer.logprobs or []], [expected])
        for place, top in enumerate(answer.top_logprobs or []):
            best = logits[place].topk(params.logprobs or 0)
            assert [token for token, _ in top] == best.indices.tolist()
            assert [score for _, score in top] == pytest.approx(best.values.tolist(), abs=TOLERANCE)
        beside, tokens = plain.result().answer, plain.result().answer.tokens
        logits = logits_of(llm, [3, 4, *tokens])[1:-1].log_softmax(-1)
        assert_same_logprobs([beside.logprobs or []], [logits.gather(1, _column(tokens))[:, 0].tolist()])


def _column(tokens: list[int]) -> torch.Tensor:
    return torch.tensor(tokens)[:, None]
