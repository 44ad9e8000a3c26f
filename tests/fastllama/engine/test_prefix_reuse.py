"""Prompts that begin alike share pages: less is computed, and no answer changes."""

from pathlib import Path

import pytest

from fastllama import Llama, SamplingParams
from fastllama.engine import Engine, Request
from fastllama.engine.model_runner import ModelRunner
from fastllama.kernels.paged_cache import PAGE_TOKENS
from tests.fastllama.engine.llamas import assert_as_alone, engine_llama
from tests.support.comparisons import assert_same_logprobs

PARAMS = SamplingParams(max_gen_len=12, temperature=1.0, seed=5, logprobs=0)
PROMPT = [(7 * place) % 320 for place in range(200)]


def answered(engine: Engine, prompt: list[int], params: SamplingParams = PARAMS) -> Request:
    request = engine.submit(prompt, params)
    request.result()
    return request


def count_prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list of the tokens of each pass over prompts."""
    counts: list[int] = []
    prefill = ModelRunner.prefill

    def counted(self: ModelRunner, chunks):  # type: ignore[no-untyped-def]
        counts.append(sum(chunk.end - chunk.begin for chunk in chunks))
        return prefill(self, chunks)

    monkeypatch.setattr(ModelRunner, "prefill", counted)
    return counts


@pytest.mark.parametrize(
    ("length", "cached"),
    [(63, 0), (64, 0), (65, 64), (127, 64), (128, 64), (129, 128), (130, 128), (192, 128), (193, 192)],
)
def test_a_prompt_that_was_computed_is_found_but_for_its_last_token(llm: Llama, length: int, cached: int) -> None:
    engine = llm.engine()
    first, second = (answered(engine, PROMPT[:length]).result() for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, cached)
    assert second.answer.tokens == first.answer.tokens
    assert_same_logprobs([second.answer.logprobs or []], [first.answer.logprobs or []])
    assert engine.stats.cached_tokens == cached


def test_the_next_turn_finds_prompt_and_answer_of_the_one_before(llm: Llama) -> None:
    engine = llm.engine()
    params = SamplingParams(max_gen_len=70, seed=3, logprobs=0)
    first = answered(engine, PROMPT[:100], params).result()
    turn = PROMPT[:100] + first.answer.tokens + [5, 6, 7]
    second = answered(engine, turn)
    assert second.result().cached_tokens == 128
    llm.model.cache.pool.forget()
    assert not assert_as_alone(llm, second.result(), PARAMS)


def test_what_differs_early_is_not_reused(llm: Llama) -> None:
    engine = llm.engine()
    answered(engine, PROMPT)
    other = answered(engine, [PROMPT[0] + 1, *PROMPT[1:]])
    assert other.result().cached_tokens == 0
    half = answered(engine, PROMPT[:100] + [9] * 100)
    assert half.result().cached_tokens == 64
    for request in (other, half):
        assert not assert_as_alone(llm, request.result(), PARAMS)


def test_generate_between_requests_changes_nothing_that_is_reused(llm: Llama) -> None:
    engine = llm.engine()
    first = answered(engine, PROMPT).result()
    llm.generate([PROMPT[1:], [3]], 20, seed=1)
    second = answered(engine, PROMPT).result()
    assert second.cached_tokens == 192 and second.answer.tokens == first.answer.tokens


def test_without_reuse_everything_is_computed(llm: Llama) -> None:
    engine = llm.engine(reuse_prefixes=False)
    assert [answered(engine, PROMPT).result().cached_tokens for _ in range(2)] == [0, 0]


def test_several_prompts_with_a_new_common_beginning_compute_it_once(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_prefilled(monkeypatch)
    engine = llm.engine()
    prompts = [PROMPT[:150] + [tail] * 5 for tail in range(4)]
    requests = [engine.submit(prompt, PARAMS) for prompt in prompts]
    engine.run()
    assert sum(counts) == 154 + 3 * (154 - 128)
    assert [request.result().cached_tokens for request in requests] == [0, 128, 128, 128]
    assert not any(assert_as_alone(llm, request.result(), PARAMS) for request in requests)


def test_several_answers_share_one_prompt(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_prefilled(monkeypatch)
    engine = llm.engine()
    params = SamplingParams(max_gen_len=6, temperature=1.5, seed=2, n=3)
    request = answered(engine, PROMPT, params)
    assert sum(counts) == 199 + 2 * 7
    assert len({tuple(answer.tokens) for answer in request.result().answers}) == 3


def test_other_weights_make_the_cache_forget(tmp_path: Path) -> None:
    llm = engine_llama(tmp_path)
    engine = llm.engine()
    before = answered(engine, PROMPT).result()
    llm.model.load_state_dict({name: -weight for name, weight in llm.model.state_dict().items()})
    after = answered(engine, PROMPT)
    assert after.result().cached_tokens == 0 and after.result().answer.tokens != before.answer.tokens
    assert not assert_as_alone(llm, after.result(), PARAMS)
    assert answered(engine, PROMPT).result().cached_tokens == 192


def test_a_model_with_another_cache_is_noticed(tmp_path: Path) -> None:
    import torch

    llm = engine_llama(tmp_path, backend="reference")
    engine = llm.engine()
    answered(engine, PROMPT)
    llm.model.to(torch.float64).to(torch.float32)
    again = answered(engine, PROMPT)
    assert again.result().cached_tokens == 0
    assert not assert_as_alone(llm, again.result(), PARAMS)


def test_least_recently_used_prompts_are_dropped_first(tmp_path: Path) -> None:
    llm = engine_llama(tmp_path, cache_tokens=6 * 64)
    engine = llm.engine()
    params = SamplingParams(max_gen_len=1, temperature=0)
    a, b, c = ([start] * 129 for start in (1, 2, 3))
    for prompt in (a, b, a, c):  # two pages of each can be found again; the third prompt takes one of them
        answered(engine, prompt, params)
    assert [answered(engine, prompt, params).result().cached_tokens for prompt in (a, c)] == [128, 128]
    assert answered(engine, b, params).result().cached_tokens == 64


def test_a_stream_finds_what_an_earlier_one_and_the_engine_left(llm: Llama) -> None:
    how = {"temperature": 1.0, "seed": [5], "logprobs": True}
    alone = [list(llm.stream([PROMPT], 12, **how)) for _ in range(2)][1]  # type: ignore[arg-type]
    cache, found = llm.model.cache, list[list[int]]()
    assign = cache.assign

    def noted(lengths, prompts=None):  # type: ignore[no-untyped-def]
        found.append(assign(lengths, prompts))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "assign", noted)
        for _ in range(2):
            again = list(llm.stream([PROMPT], 12, reuse_prefix=True, **how))  # type: ignore[arg-type]
            assert [one.tokens for one in again] == [one.tokens for one in alone]
            assert_same_logprobs([one.logprobs or [] for one in again], [one.logprobs or [] for one in alone])
        list(llm.stream([PROMPT[:50] + PROMPT], 3, reuse_prefix=True))
        engine_answer = answered(llm.engine(), PROMPT).result()
        list(llm.stream([PROMPT], 1, reuse_prefix=True))
    assert found == [[0], [192], [0], [192]] and engine_answer.cached_tokens == 192


def test_an_echo_waits_for_its_log_probabilities(llm: Llama) -> None:
    """The second answer finds the whole prompt in the cache, while the first has yet to compute its scores."""
    prompt = [3 + number % 200 for number in range(2 * PAGE_TOKENS + 1)]
    engine = llm.engine(max_tokens_per_step=16)
    engine.submit(prompt, SamplingParams(max_gen_len=1)).result()
    other = engine.submit([5, 6], SamplingParams(max_gen_len=60, ignore_eos=True))
    engine.step()
    params = SamplingParams(max_gen_len=2, temperature=0, echo=True, logprobs=0, n=2)
    for answer in engine.submit(prompt, params).result().answers:
        assert len(answer.logprobs or []) == len(answer.tokens) >= len(prompt)
    other.result()
