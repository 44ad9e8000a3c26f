"""Engine: submit, iterate, cancel, refuse, fail, and share the model with other calls."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastllama import Engine, Llama, SamplingParams
from fastllama.decode_graph import Decoder
from fastllama.engine.model_runner import ModelRunner
from tests.fastllama.engine.llamas import MAX_SEQ_LEN, assert_as_alone, engine_llama

PARAMS = SamplingParams(max_gen_len=20, temperature=1.0, seed=5, logprobs=0)
BUSY = "this model is busy with another call or an open stream"


def test_a_request_is_a_text_token_ids_or_a_dialog(llm: Llama) -> None:
    engine, encode = llm.engine(), llm.tokenizer.encode
    dialog = [{"role": "user", "content": "a cat"}]
    tokens = encode("a cat", bos=True, eos=False)
    prompts: list[tuple[Any, list[int]]] = [
        ("a cat", tokens),
        (tokens, tokens),
        (np.array(tokens), tokens),
        (torch.tensor(tokens), tokens),
        (dialog, llm.formatter.encode_dialog_prompt(dialog)),  # type: ignore[arg-type]
    ]
    for prompt, expected in prompts:
        result = engine.submit(prompt, PARAMS).result()
        assert result.prompt_tokens == expected and result.answer.finish_reason == "length"
        assert not assert_as_alone(llm, result, PARAMS)


def test_increments_joined_are_the_result(llm: Llama) -> None:
    engine = llm.engine()
    request = engine.submit([5, 6], SamplingParams(max_gen_len=30, seed=1, n=2, logprobs=2))
    other = engine.submit([7], PARAMS)
    increments = list(request)
    for answer in request.result().answers:
        mine = [one for one in increments if one.index == answer.index]
        assert "".join(one.text for one in mine) == answer.text == llm.tokenizer.decode(answer.tokens)
        assert [token for one in mine for token in one.tokens] == answer.tokens
        assert [value for one in mine for value in one.logprobs or []] == answer.logprobs
        assert [top for one in mine for top in one.top_logprobs or []] == answer.top_logprobs
        assert [one.finish_reason for one in mine if one.finish_reason] == ["length"] and mine[-1].finish_reason
    assert list(request) == [], "each increment comes once"
    assert other.result().answer.finish_reason == "length"
    times = request.result().times
    assert times.first_token is not None and times.end is not None
    assert times.arrival <= times.first_token == times.tokens[0] <= times.tokens[-1] <= times.end


def test_a_short_request_does_not_wait_for_a_long_one(llm: Llama) -> None:
    engine = llm.engine()
    long = engine.submit([5], SamplingParams(max_gen_len=200, seed=1))
    queue = [engine.submit([6, number], SamplingParams(max_gen_len=3, seed=1)) for number in range(9)]
    queue[-1].result()
    assert not long.is_finished and all(request.is_finished for request in queue)
    assert engine.stats.running == 1 and engine.stats.finished_requests == 9
    long.cancel()


def test_rows_that_have_ended_are_not_read_by_later_steps(llm: Llama) -> None:
    engine = llm.engine()
    short = [engine.submit([5, number], SamplingParams(max_gen_len=3, seed=1)) for number in range(3)]
    last = engine.submit([6], SamplingParams(max_gen_len=50, seed=1))
    for _ in range(10):
        engine.step()
    assert all(request.is_finished for request in short)
    assert sorted(llm.decoder._lengths.bounds(4))[-2:] == [1, len(last.partial.answer.tokens) + 1]
    last.cancel()
    assert llm.decoder._lengths.bounds(4) == [1] * 4


def test_a_step_computes_one_chunk_of_prompts_beside_running_answers(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    prefill = ModelRunner.prefill

    def noted(self: ModelRunner, chunks: Any) -> Any:
        sizes.append(sum(chunk.end - chunk.begin for chunk in chunks))
        return prefill(self, chunks)

    monkeypatch.setattr(ModelRunner, "prefill", noted)
    engine = llm.engine(max_tokens_per_step=30)
    first = engine.submit([5], SamplingParams(max_gen_len=100, seed=1))
    next(iter(first))
    requests = [engine.submit(list(range(number, number + 100)), PARAMS) for number in range(2)]
    received = len(first.partial.answer.tokens)
    while not all(request.partial.answer.tokens for request in requests):
        engine.step()
        received += 1
        assert len(first.partial.answer.tokens) == received, "a decoding row gets a token in every step"
    assert sizes == [30] * 6 + [18]
    engine.close()


def test_prompts_of_any_length_up_to_the_context(llm: Llama) -> None:
    engine = llm.engine()
    for length in (1, MAX_SEQ_LEN - 1, MAX_SEQ_LEN):
        params = SamplingParams(seed=1, logprobs=0)
        result = engine.submit([9] * length, params).result()
        assert len(result.answer.tokens) == MAX_SEQ_LEN - length and result.answer.finish_reason == "length"
        if length < MAX_SEQ_LEN:
            assert_as_alone(llm, result, params)
    assert engine.submit([9] * (MAX_SEQ_LEN + 1), SamplingParams(max_gen_len=0)).result().answer.tokens == []


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([9] * (MAX_SEQ_LEN + 1), {}, "the prompt has 257 tokens, more than the max_seq_len of 256: shorten it"),
        ([], {}, "the prompt is empty"),
        ([576], {}, "token 0 of the prompt must be a whole number from 0 to 575, got 576"),
        ([[1]], {}, "token 0 of the prompt must be a whole number"),
        (3, {}, "the prompt must be a list of token ids"),
        ([1], {"stop_token_ids": [576]}, "stop_token_ids must have token ids from 0 to 575, got 576"),
    ],
    ids=["long", "empty", "outside", "nested", "number", "stop"],
)
def test_a_wrong_prompt_is_refused_and_leaves_nothing(llm: Llama, prompt: Any, params: Any, message: str) -> None:
    engine = llm.engine()
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, SamplingParams(**params))
    llm.model.check_idle()
    assert engine.stats[:2] == (0, 0) and not engine.step()


def test_a_request_that_can_never_fit_is_refused_at_once(tmp_path: Path) -> None:
    llm = engine_llama(tmp_path, cache_tokens=128)
    engine = llm.engine()
    with pytest.raises(ValueError, match="needs up to 149 positions of the cache, which has 128: shorten the prompt"):
        engine.submit([9] * 100, SamplingParams(max_gen_len=50))
    llm.model.check_idle()
    result = engine.submit([9] * 100, SamplingParams(max_gen_len=29, seed=1)).result()
    assert len(result.answer.tokens) == 29 and engine.stats.pages == 2


def test_a_request_may_be_cancelled_at_any_moment(llm: Llama) -> None:
    engine = llm.engine()
    params = SamplingParams(max_gen_len=100, seed=1, n=2, logprobs=0)
    running = [engine.submit([5, number], params) for number in range(3)]
    waiting = running[-1]
    for _ in range(10):
        engine.step()
    assert engine.stats.running == 4 and engine.stats.waiting == 2
    waiting.cancel()
    running[0].cancel()
    for request, count in ((waiting, 0), (running[0], 10)):
        assert request.is_finished
        for answer in request.result().answers:
            assert (answer.finish_reason, len(answer.tokens)) == ("cancelled", count)
    request_alone = engine.submit([8], PARAMS)
    engine.run()
    assert {answer.finish_reason for answer in running[1].result().answers} == {"length"}
    assert not assert_as_alone(llm, request_alone.result(), PARAMS)
    running[0].cancel()
    assert running[0].result().answer.finish_reason == "cancelled", "cancelling again changes nothing"


def test_other_calls_are_refused_while_there_are_requests_and_work_after(llm: Llama) -> None:
    engine = llm.engine()
    request = engine.submit([5], PARAMS)
    for call in (lambda: llm.generate([[5]], 3), lambda: llm.engine().submit([5], PARAMS)):
        with pytest.raises(RuntimeError, match=BUSY):
            call()
    expected = request.result().answer.tokens
    assert llm.generate([[5]], 20, 1.0, seed=[5])[0] == [expected]
    stream = llm.stream([[5]], 3)
    next(stream)
    with pytest.raises(RuntimeError, match=BUSY):
        engine.submit([5], PARAMS)
    stream.close()
    assert engine.submit([5], PARAMS).result().answer.tokens == expected


def test_two_engines_take_turns_on_one_model(llm: Llama) -> None:
    one, two = llm.engine(), llm.engine(reuse_prefixes=False)
    answers = [engine.submit([5] * 70, PARAMS).result().answer.tokens for engine in (one, two, one, two)]
    assert answers[0] == answers[1] == answers[2] == answers[3]


def test_an_error_in_every_step_reaches_every_request_and_the_next_works(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("prefill", "step", "receive"):
        engine = llm.engine()
        requests = [engine.submit([5, 6, number], PARAMS) for number in range(6)]
        with monkeypatch.context() as patch:

            def fail(*args: Any) -> None:
                raise ArithmeticError("out of numbers")

            patch.setattr(ModelRunner, method, fail)
            engine.run()
        for request in requests:
            answer = request.result().answer
            assert (answer.finish_reason, answer.error) == ("error", "ArithmeticError: out of numbers")
        assert engine.stats[:3] == (0, 0, 0) and engine.failure is None
        again = engine.submit([5, 6, 7], PARAMS)
        assert not assert_as_alone(llm, again.result(), PARAMS)


def test_an_error_before_the_first_step_is_the_callers(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory for graphs is missing. Pages that rows of `generate` have kept are free, too."""
    engine = llm.engine()
    llm.generate([[5] * 70], 3)
    for other_engine in (engine, llm.engine()):
        with monkeypatch.context() as patch:

            def fail(*args: Any) -> None:
                raise ArithmeticError("out of numbers")

            patch.setattr(Decoder, "begin", fail)
            with pytest.raises(ArithmeticError, match="out of numbers"):
                other_engine.submit([5], PARAMS)
        assert isinstance(other_engine.failure, ArithmeticError) and other_engine.stats[:3] == (0, 0, 0)
        llm.model.check_idle()
        llm.generate([[5] * 70], 3)
    assert not assert_as_alone(llm, engine.submit([6], PARAMS).result(), PARAMS)


def test_an_interrupted_step_ends_all_requests(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine()
    request, other = engine.submit([5], PARAMS), engine.submit([6], PARAMS)
    enqueue = Decoder.enqueue_steps

    def interrupted(self: Decoder) -> None:
        enqueue(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "enqueue_steps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            request.result()
    with pytest.raises(RuntimeError, match="the engine was stopped by KeyboardInterrupt"):
        other.result()
    assert isinstance(engine.failure, KeyboardInterrupt) and engine.stats[:3] == (0, 0, 0)
    assert not assert_as_alone(llm, engine.submit([6], PARAMS).result(), PARAMS)
    assert engine.failure is None, "it works again"


@pytest.mark.parametrize("scored", [None, 0])
def test_logits_that_are_not_numbers_end_only_their_request(tmp_path: Path, scored: int | None) -> None:
    llm = engine_llama(tmp_path)
    weights = llm.model.state_dict()
    weights["tok_embeddings.weight"][7] = torch.nan
    llm.model.load_state_dict(weights)
    engine = llm.engine()
    params = SamplingParams(max_gen_len=20, seed=5, logprobs=0, prompt_logprobs=scored, logit_bias={7: -100})
    good, bad, late = (engine.submit(prompt, params) for prompt in ([5, 6], [5, 7, 8], [9]))
    engine.run()
    answer = bad.result().answer
    assert answer.finish_reason == "error" and answer.tokens == [] and answer.error is not None
    where = "of the prompt" if scored is not None else "at position 3"
    assert answer.error.startswith(f"the logits {where} are not finite numbers; the weights, or their overflow")
    for request in (good, late):
        assert request.result().answer.finish_reason == "length" and len(request.result().answer.tokens) == 20


def test_stop_strings_end_answers_of_the_model(llm: Llama) -> None:
    engine = llm.engine()
    plain = engine.submit([5, 6], PARAMS).result().answer
    stop = plain.text[len(plain.text) // 2 :][:3]
    at = plain.text.index(stop)
    other = engine.submit([9], SamplingParams(max_gen_len=60, seed=2))
    answer = (
        engine.submit([5, 6], SamplingParams(max_gen_len=20, temperature=1.0, seed=5, logprobs=0, stop=stop))
        .result()
        .answer
    )
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (plain.text[:at], "stop", stop)
    assert answer.tokens == plain.tokens[: len(answer.tokens)] and len(answer.logprobs or []) == len(answer.tokens)
    assert llm.tokenizer.decode(answer.tokens).startswith(answer.text)
    assert len(other.result().answer.tokens) == 60


def test_a_closed_engine_takes_no_requests(llm: Llama) -> None:
    with llm.engine() as engine:
        request = engine.submit([5], PARAMS)
        next(iter(request))
    assert request.result().answer.finish_reason == "cancelled"
    for call in (lambda: engine.submit([5], PARAMS), engine.start):
        with pytest.raises(RuntimeError, match="the engine is closed: make another"):
            call()
    engine.close()


def test_wrong_settings_are_refused(llm: Llama) -> None:
    with pytest.raises(ValueError, match="max_tokens_per_step must be a whole number from 1 to 2048, got 0"):
        llm.engine(max_tokens_per_step=0)
    with pytest.raises(ValueError, match="reuse_prefixes must be True or False, got str"):
        Engine(llm, reuse_prefixes="yes")  # type: ignore[arg-type]
