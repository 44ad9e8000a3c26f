"""Rows with grammars beside rows without, with steps that are queued ahead, graphs, guesses and too few pages."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllama import Llama, SamplingParams
from fastllama.decode_graph import Decoder
from fastllama.engine.grammar import Grammar
from fastllama.engine.grammar_matcher import GrammarMatcher, grammar_matcher
from fastllama.engine.model_runner import ModelRunner
from fastllama.engine.sequence import Sequence
from fastllama.speculation import LookupGuesser
from fastllama.step_graphs import PLAIN, Extras
from tests.fastllama.engine.llamas import engine_llama
from tests.fastllama.engine.test_same_answers import AheadDecoder
from tests.support.comparisons import assert_same_logprobs
from tests.support.fake_graph import RecordedGraph
from tests.support.tiers import parameters

WORDS = Grammar.lark("start: /[a-z]{1,7}( [a-z]{1,7}){5,40}\\./")
NUMBERS = Grammar.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 4})
GUIDED, FREE = SamplingParams(grammar=WORDS, seed=3, max_gen_len=24), SamplingParams(seed=8, max_gen_len=30)

DECODERS: dict[str, tuple[str, Callable[[Llama], Decoder]]] = {
    "native": ("native", lambda llm: llm.decoder),
    "native-ahead": ("native", lambda llm: AheadDecoder(llm.model)),
    "reference": ("reference", lambda llm: llm.decoder),
    "ahead-unroll-3": ("reference", lambda llm: AheadDecoder(llm.model, unroll=3)),
    "graphs-ahead": ("reference", lambda llm: AheadDecoder(llm.model, new_graph=RecordedGraph)),
    "graphs-ahead-unroll-2": (
        "reference",
        lambda llm: AheadDecoder(llm.model, new_graph=RecordedGraph, unroll=2),
    ),
    "guesses": ("reference", lambda llm: Decoder(llm.model, guesser=LookupGuesser(llm.model), n_guesses=3)),
    "guesses-ahead": (
        "reference",
        lambda llm: AheadDecoder(llm.model, guesser=LookupGuesser(llm.model), n_guesses=2, new_graph=RecordedGraph),
    ),
}
QUICK = {"native", "native-ahead", "ahead-unroll-3", "graphs-ahead", "guesses-ahead"}


def traffic() -> list[tuple[list[int], SamplingParams]]:
    """Some with a grammar, of those some with controls or log-probabilities, and some without."""
    asked: list[tuple[list[int], SamplingParams]] = []
    for number in range(9):
        given: dict[str, Any] = {"temperature": 0.9, "top_p": 1.0, "seed": number, "max_gen_len": 30 + 9 * (number % 4)}
        if number % 3:
            given["grammar"] = WORDS if number % 2 else NUMBERS
        if number in (2, 3, 4):
            given |= {"frequency_penalty": 0.8, "min_tokens": 20, "stop_token_ids": range(200, 250)}
        if number in (4, 5, 6):
            given["logprobs"] = number - 4
        if number == 7:
            given |= {"n": 2, "stop": ["q", " z"]}
        asked.append(([(number * 31 + place) % 320 for place in range(50 + 3 * number)], SamplingParams(**given)))
    return asked


@pytest.mark.parametrize("kind", parameters({name: name for name in DECODERS}, quick=QUICK))
def test_answers_are_those_of_each_request_alone(tmp_path: Path, kind: str) -> None:
    backend, decoder_of = DECODERS[kind]
    llm = engine_llama(tmp_path, backend=backend, cache_tokens=5 * 64)
    alone = llm.decoder
    llm.decoder = decoder_of(llm)
    engine = llm.engine()
    requests = [engine.submit(*one) for one in traffic()]
    engine.run()
    assert engine.stats.preemptions > 0 and engine.stats.used_pages == 0
    llm.decoder = alone
    for request, (prompt, params) in zip(requests, traffic(), strict=True):
        llm.model.cache.pool.forget()
        expected = llm.engine().submit(prompt, params).result()
        for answer, wanted in zip(request.result().answers, expected.answers, strict=True):
            assert (answer.tokens, answer.text, answer.finish_reason) == (
                wanted.tokens,
                wanted.text,
                wanted.finish_reason,
            )
            assert answer.error is None and answer.stop_reason == wanted.stop_reason
            assert_same_logprobs([answer.logprobs or []], [wanted.logprobs or []])
            for found, top in zip(answer.top_logprobs or [], wanted.top_logprobs or [], strict=True):
                assert [token for token, _ in found] == [token for token, _ in top]


Step = tuple[list[int], int]  # the arrivals of a step's sequences, and the steps that are queued with it


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """What every step ran."""
    found: list[Step] = []
    step = ModelRunner.step

    def recorded(self: ModelRunner, sequences: list[Sequence]) -> None:
        step(self, sequences)
        found.append(([one.arrival for one in sequences], self.queued))

    monkeypatch.setattr(ModelRunner, "step", recorded)
    return found


def run(llm: Llama, steps: list[Step], *params: SamplingParams) -> tuple[list[list[int]], list[Step], int]:
    """Answers of requests that come together, the steps that they took, and the calls of `Engine.step`."""
    engine = llm.engine()
    requests = [engine.submit([5, 250, 17 + number], one) for number, one in enumerate(params)]
    steps.clear()
    calls = 1
    while engine.step():
        calls += 1
    return [request.result().answer.tokens for request in requests], list(steps), calls


def test_rows_without_a_grammar_keep_their_queued_steps(llm: Llama, steps: list[Step]) -> None:
    usual, llm.decoder = llm.decoder, AheadDecoder(llm.model)
    (alone,), expected, _ = run(llm, steps, FREE)
    (free, guided), found, _ = run(llm, steps, FREE, GUIDED)
    assert free == alone
    assert [queued for arrivals, queued in found if 0 in arrivals] == [queued for _, queued in expected]
    assert len(expected) == 30 and max(queued for _, queued in expected) == 3
    parts = [place for place, (arrivals, _) in enumerate(found[:30]) if 1 in arrivals]
    assert parts == list(range(0, 30, 3)), "a row with a grammar waits for its token to be received"
    rest = [arrivals for arrivals, _ in found[30:]]
    assert len(guided) == 24 and rest == [[1]] * 14
    assert all(queued == 1 for _, queued in found[32:]), "nothing is queued ahead of rows with grammars alone"
    llm.decoder = usual


def test_rows_with_grammars_alone_queue_nothing_ahead(llm: Llama, steps: list[Step]) -> None:
    usual, llm.decoder = llm.decoder, AheadDecoder(llm.model)
    answers, found, calls = run(llm, steps, GUIDED, GUIDED)
    assert [len(tokens) for tokens in answers] == [24, 24]
    assert found == [([0, 1], 1)] * 24 and calls == 24, "each step is received at once"
    llm.decoder = usual


def test_on_a_cpu_rows_with_grammars_take_part_in_every_step(llm: Llama, steps: list[Step]) -> None:
    (free, guided), found, _ = run(llm, steps, FREE, GUIDED)
    assert [arrivals for arrivals, _ in found] == [[0, 1]] * 24 + [[0]] * 6
    assert (len(free), len(guided)) == (30, 24)


def test_a_step_with_grammars_is_one_launch_more(tmp_path: Path) -> None:
    """The graph of steps without is the one that there was, and it is used again."""
    llm = engine_llama(tmp_path, backend="fused", max_seq_len=64, rows=2, n_layers=1)
    llm.decoder = Decoder(llm.model, new_graph=RecordedGraph)
    engine = llm.engine()
    short, digits = SamplingParams(seed=1, max_gen_len=2), Grammar.lark("start: /[0-9]{3}/")
    alone = engine.submit([5, 6], short).result().answer
    plain = dict(llm.decoder.graphs.captured)
    beside = engine.submit([5, 6], short), engine.submit([7], SamplingParams(seed=2, grammar=digits))
    assert beside[0].result().answer == alone and len(beside[1].result().answer.text) == 3
    scored = engine.submit([7], SamplingParams(seed=2, grammar=digits, logprobs=0)).result().answer
    assert scored.text == beside[1].result().answer.text and len(scored.logprobs or []) == 3
    captured: dict[Any, Any] = llm.decoder.graphs.captured
    assert plain.items() <= captured.items()
    names = {key[:2]: [name for name, _ in graph.calls] for key, graph in captured.items()}
    for n_rows in (1, 2):
        masked = names[n_rows, Extras(masks=True)]
        place = masked.index("_mask_logits_kernel")
        assert masked[place + 1 :] == ["_statistics_kernel", "_draw_kernel"]
        if n_rows == 1:
            assert masked[:place] + masked[place + 1 :] == names[1, PLAIN]
    assert names[1, Extras(masks=True, scores=True)].count("_mask_logits_kernel") == 1


def test_a_row_forgets_the_grammar_of_the_request_before(llm: Llama) -> None:
    """Also where it moves, and in steps with masks for others."""
    engine = llm.engine()
    alone = engine.submit([3, 4], FREE).result().answer
    guided = [engine.submit([9, number], GUIDED) for number in range(4)]
    engine.run()
    free = engine.submit([3, 4], FREE)
    others = [engine.submit([9, number], GUIDED) for number in range(3)]
    assert free.result().answer == alone
    assert [one.result().answer for one in others] == [one.result().answer for one in guided[:3]]
    short = [engine.submit([9, number], SamplingParams(seed=1, max_gen_len=3)) for number in range(3)]
    high, moved = engine.submit([9, 0], GUIDED), engine.submit([3, 4], FREE)
    assert high.result().answer == guided[0].result().answer and moved.result().answer == alone
    assert all(len(one.result().answer.tokens) == 3 for one in short)


def test_the_prompt_is_echoed_and_found_again(llm: Llama) -> None:
    engine, prompt = llm.engine(), [place % 300 for place in range(150)]
    first = engine.submit(prompt, GUIDED).result()
    for scored in (None, 0):
        params = SamplingParams(grammar=WORDS, seed=3, max_gen_len=24, echo=True, logprobs=scored)
        result = engine.submit(prompt, params).result()
        assert (first.cached_tokens, result.cached_tokens) == (0, 128 if scored is None else 0)
        assert result.answer.tokens == prompt + first.answer.tokens
        assert result.answer.text.endswith(first.answer.text)
        assert scored is None or len(result.answer.logprobs or []) == len(result.answer.tokens)


def test_a_grammar_is_prepared_outside_of_the_engines_locks(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> GrammarMatcher:
        begun.set()
        assert may_go_on.wait(60)
        return grammar_matcher(*arguments)

    monkeypatch.setattr("fastllama.engine.prompts.grammar_matcher", slowly)
    engine, submitted = llm.engine(), []
    thread = threading.Thread(target=lambda: submitted.append(engine.submit([3], GUIDED)))
    thread.start()
    assert begun.wait(60)
    answer = engine.submit([4], FREE).result().answer
    assert len(answer.tokens) == 30 and not submitted
    may_go_on.set()
    thread.join()
    assert len(submitted[0].result().answer.tokens) == 24
