"""An engine in another process: its answers are those of the engine itself, and its failures are told."""

import asyncio
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastllama import Engine, Llama, SamplingParams, builtin_checkpoint
from fastllama.engine import Grammar, Request, engine_host
from fastllama.engine.any_engine import EngineFailed
from fastllama.engine.commands import NewRequest
from fastllama.engine.messages import Failure, Question, Stop
from fastllama.engine.remote_engine import GONE, RemoteEngine
from tests.support.remote_engines import Ends, connected, hang_up
from tests.support.timeouts import HANG_SECONDS, wait_until

ENDLESS = SamplingParams(max_gen_len=200, temperature=1.0, seed=1)
PARAMS = (
    SamplingParams(max_gen_len=30, temperature=1.0, seed=3, logprobs=2),
    SamplingParams(max_gen_len=12, temperature=1.0, seed=4, n=6),  # of four rows
    SamplingParams(max_gen_len=9, temperature=0.0, logprobs=1, prompt_logprobs=1, echo=True),
    SamplingParams(max_gen_len=0, prompt_logprobs=0),
    SamplingParams(max_gen_len=40, temperature=1.0, seed=5, logit_bias={65: 100}, stop=["AAA"]),
)


@pytest.fixture
def engine(llm: Llama) -> Iterator[Engine]:
    with llm.engine().start() as engine:
        yield engine


@pytest.fixture
def ends(engine: Engine) -> Iterator[Ends]:
    with connected(engine) as ends:
        yield ends


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_answers_are_the_engines_own(engine: Engine, ends: Ends, params: SamplingParams, is_streamed: bool) -> None:
    prompt = [5, 250, 17, 300]
    expected = engine.submit(prompt, params).result()
    engine.llm.model.cache.pool.forget()
    request = ends.remote.submit(prompt, params, is_streamed=is_streamed)
    increments = list(request)
    found = request.partial
    assert (found.answers, found.prompt_scores) == (expected.answers, expected.prompt_scores)
    assert (found.prompt_tokens, found.cached_tokens) == (prompt, expected.cached_tokens)
    for answer in found.answers:
        parts = [one for one in increments if one.index == answer.index]
        assert "".join(one.text for one in parts) == answer.text
        assert [token for one in parts for token in one.tokens] == answer.tokens
        assert is_streamed or params.n > 1 or len(parts) == 1
    times, n_tokens = found.times, len(found.answer.tokens) - (len(prompt) if params.echo else 0)
    moments = [times.arrival, *([times.first_token] if n_tokens else []), *times.tokens, times.end]
    assert moments == sorted(moment for moment in moments if moment is not None)
    wait_until(lambda: not ends.remote._requests and not ends.host._open)


def test_what_is_found_in_the_cache_is_told(ends: Ends) -> None:
    prompt = list(range(5, 205))
    for n_cached in (0, 192):
        request = ends.remote.submit(prompt, SamplingParams(max_gen_len=2, seed=1))
        assert request.result().cached_tokens == n_cached


def test_what_nobody_waits_for_goes_together(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_host, "REST", HANG_SECONDS)
    monkeypatch.setattr(engine_host, "LONGEST_REST", HANG_SECONDS)
    first = ends.remote.submit([5], ENDLESS)
    assert len(list(first)) <= 4, "the first token, one message before the first rest, and the end"
    later = list(ends.remote.submit([5], ENDLESS))
    assert len(later) <= 2 and len(later[0].tokens) < 100, "the first token comes at once"


def test_many_tasks_read_what_others_cancel(engine: Engine, ends: Ends) -> None:
    async def ask(number: int) -> Request:
        request = ends.remote.submit([5, number], ENDLESS)
        async for _ in request:
            if number % 3 == 0:
                request.cancel()
        return request

    async def ask_all() -> list[Request]:
        return await asyncio.gather(*(ask(number) for number in range(20)))

    requests = asyncio.run(ask_all())
    wait_until(lambda: not engine._held)
    for number, request in enumerate(requests):
        answer = request.partial.answer
        own = engine.submit([5, number], ENDLESS).result().answer
        assert answer.tokens == own.tokens[: len(answer.tokens)]
        assert answer.finish_reason == ("cancelled" if len(answer.tokens) < 200 else "length")
        assert number % 3 == 0 or answer.finish_reason == "length"
    assert ends.remote.stats == engine.stats


def test_a_prompt_is_checked_before_it_is_sent(ends: Ends) -> None:
    for prompt, text in (([5] * 300, "300"), ([], "empty"), ([10**6], "1000000")):
        with pytest.raises(ValueError, match=text):
            ends.remote.submit(prompt)
    with pytest.raises(ValueError, match="logit_bias"):
        ends.remote.submit([5], SamplingParams(logit_bias={10**6: 1.0}))
    assert ends.remote.encode("a") == ends.remote.facts.tokenizer.encode("a", bos=True, eos=False)


def test_grammars_are_compiled_at_the_other_end() -> None:
    llm = Llama.build(*builtin_checkpoint(), max_seq_len=256, max_batch_size=2, device="cpu")
    digits = SamplingParams(max_gen_len=30, temperature=1.0, seed=1, grammar=Grammar.lark("start: /[0-9]{5,9}/"))
    with llm.engine().start() as engine, connected(engine) as ends:
        expected = engine.submit("How many?", digits).result().answer
        assert expected.text.isdigit() and expected.finish_reason == "stop"
        assert ends.remote.submit("How many?", digits).result().answer == expected


def test_a_grammar_that_is_refused_is_an_error_of_its_request(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise ValueError("the grammar is too large")

    monkeypatch.setattr("fastllama.engine.engine.new_matcher", refuse)
    with pytest.raises(ValueError, match="the grammar is too large"):
        ends.remote.submit([5], SamplingParams(grammar=Grammar.lark('start: "a"')))
    monkeypatch.undo()
    assert len(ends.remote.submit([5], SamplingParams(max_gen_len=3, seed=1)).result().answer.tokens) == 3
    wait_until(lambda: not ends.remote._requests and not ends.remote._asked)


def test_the_error_of_an_answer_is_told(engine: Engine, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ends.remote.submit([5], ENDLESS)
    next(iter(request))

    def broken(*arguments: Any) -> Any:
        raise ArithmeticError("as planned")

    for sequence in tuple(engine._core.requests):
        monkeypatch.setattr(sequence.text, "push", broken)
    answer = request.result().answer
    assert (answer.finish_reason, answer.error) == ("error", "ArithmeticError: as planned")


def test_closing_ends_all_requests(engine: Engine, ends: Ends) -> None:
    requests = [ends.remote.submit([5, number], ENDLESS) for number in range(12)]
    next(iter(requests[0]))
    ends.remote.close()
    reasons = {request.result().answer.finish_reason for request in requests}
    assert "cancelled" in reasons and reasons <= {"cancelled", "length"}
    assert not engine.has_thread and ends.remote.stats.running == 0
    with pytest.raises(EngineFailed, match="is closed"):
        ends.remote.submit([5])
    ends.remote.close()


def test_a_request_that_comes_too_late_is_refused(engine: Engine, ends: Ends) -> None:
    """The engine was closed in its own process, which the other one does not know yet."""
    engine.close()
    request = ends.remote.submit([5], ENDLESS)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        request.result()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        ends.remote.submit([5], SamplingParams(grammar=Grammar.lark('start: "a"')))


def test_the_failure_of_the_engine_ends_all_requests(
    engine: Engine, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ends.remote.submit([5, number], ENDLESS) for number in range(3)]
    for request in requests:
        next(iter(request))
    monkeypatch.setattr("fastllama.engine.core.is_survivable", lambda error, model: False)

    def broken() -> Any:
        raise ArithmeticError("as planned")

    monkeypatch.setattr(engine._core, "_admit", broken)
    for request in requests:
        with pytest.raises(EngineFailed, match="ArithmeticError: as planned"):
            request.result()
    assert ends.remote.failure is None, "the engine's process tells that by itself"
    ends.host.tell(Failure("as planned"))
    wait_until(lambda: ends.remote.failure is not None)
    with pytest.raises(EngineFailed, match="as planned"):
        ends.remote.submit([5])


def test_a_process_that_is_gone_ends_all_that_waits_for_it(
    engine: Engine, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, may_go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        compiling.set()
        may_go_on.wait(HANG_SECONDS)

    request = ends.remote.submit([5], ENDLESS)
    monkeypatch.setattr("fastllama.engine.engine.new_matcher", slow)
    refused: list[BaseException] = []

    def submit() -> None:
        try:
            ends.remote.submit([5], SamplingParams(grammar=Grammar.lark('start: "a"')))
        except EngineFailed as error:
            refused.append(error)

    submitting = threading.Thread(target=submit)
    submitting.start()
    assert compiling.wait(HANG_SECONDS)
    hang_up(ends.host._connection)
    with pytest.raises(EngineFailed, match=GONE):
        request.result()
    submitting.join(HANG_SECONDS)
    may_go_on.set()
    assert str(refused[0]) == GONE and ends.remote.has_lost_engine
    for ask in (lambda: ends.remote.stats, lambda: ends.remote.submit([5])):
        with pytest.raises(EngineFailed, match=GONE):
            ask()
    ends.remote.close()
    wait_until(lambda: not engine._held)
    assert engine.stats.running == engine.stats.waiting == 0, "nobody reads the answers, so they are cancelled"


def test_closing_waits_for_no_grammar(engine: Engine, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling, may_go_on = threading.Semaphore(0), threading.Event()

    def slow(*arguments: Any) -> Any:
        compiling.release()
        may_go_on.wait(HANG_SECONDS)
        raise ValueError("as planned")

    monkeypatch.setattr("fastllama.engine.engine.new_matcher", slow)
    params = SamplingParams(grammar=Grammar.lark('start: "a"'))
    refused: list[Exception] = []

    def submit() -> None:
        try:
            ends.remote.submit([5], params)
        except (ValueError, EngineFailed) as error:
            refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(2 * engine_host.COMPILING_THREADS)]
    for thread in threads:
        thread.start()
    for _ in range(engine_host.COMPILING_THREADS):
        assert compiling.acquire(timeout=HANG_SECONDS)
    ends.remote.close()
    assert not may_go_on.is_set() and not refused and not engine.has_thread
    may_go_on.set()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert len(refused) == len(threads)


def test_an_answer_of_several_is_told_when_it_ends(engine: Engine, ends: Ends) -> None:
    """Also where increments are not wanted: a server counts the answers that are open."""
    bias = {token: -100.0 for token in range(576) if token != 65}
    params = SamplingParams(max_gen_len=150, temperature=1.0, seed=1, n=6, logit_bias=bias)  # of four rows
    request = ends.remote.submit([5], params, is_streamed=False)
    numbers: list[int] = []

    def look() -> bool:
        numbers.append(request.n_open)
        return request.is_finished

    wait_until(look)
    assert set(numbers) >= {6, 2}, "two have to wait for the others"


def test_what_cannot_be_sent_leaves_nothing_behind(ends: Ends) -> None:
    command = NewRequest([5], SamplingParams(max_gen_len=3, seed=1), frozenset(), budget=3)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        ends.remote.accept(command._replace(stop_ids=lambda: None))  # type: ignore[arg-type]
    assert not ends.remote._requests
    assert len(ends.remote.accept(command).result().answer.tokens) == 3


def test_a_message_that_breaks_the_reader_ends_all_requests(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    request = ends.remote.submit([5], ENDLESS)
    next(iter(request))

    def broken(at_once: bool) -> None:
        raise ArithmeticError("as planned")

    ends.remote.on_stop = broken
    ends.host.tell(Stop(at_once=False))
    with pytest.raises(EngineFailed, match="as planned"):
        request.result()
    assert not ends.remote.has_lost_engine and "cannot be read: ArithmeticError" in caplog.text


def test_what_is_compiled_for_a_process_that_is_gone_is_cancelled(
    engine: Engine, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, accepted = engine.accept, threading.Event()

    def slow(command: Any) -> Any:
        hang_up(ends.host._connection)
        wait_until(lambda: ends.host._is_closed)
        request = accept(command._replace(params=ENDLESS))
        accepted.set()
        return request

    monkeypatch.setattr(engine, "accept", slow)
    with pytest.raises(EngineFailed, match=GONE):
        ends.remote.submit([5], SamplingParams(grammar=Grammar.lark('start: "a"')))
    assert accepted.wait(HANG_SECONDS)
    wait_until(lambda: not engine._held)
    assert engine.stats.finished_requests == 1


@pytest.mark.parametrize("work", ["_follow", "_sent"])
def test_a_host_that_breaks_keeps_its_error(
    engine: Engine, ends: Ends, work: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = engine.submit([5], ENDLESS)

    def broken(*arguments: Any) -> Any:
        raise ArithmeticError("as planned")

    monkeypatch.setattr(ends.host, work, broken)
    ends.remote.tell(Question(10**6, "stats"))
    wait_until(lambda: ends.host.failure is not None)
    assert str(ends.host.failure) == "as planned" and "cannot go on: ArithmeticError" in caplog.text
    assert request.result().answer.finish_reason == "length", "it is not the other process's"


def test_the_engines_process_tells_when_to_stop(ends: Ends) -> None:
    told: list[bool] = []
    ends.remote.on_stop = told.append
    for at_once in (False, True):
        ends.host.tell(Stop(at_once))
        assert ends.remote.stats.running == 0, "the reply comes after it"
    assert told == [False, True]


def test_the_other_process_needs_no_thread_of_the_callers(ends: Ends) -> None:
    assert ends.remote.has_thread and not ends.remote.step()
    assert isinstance(ends.remote, RemoteEngine)
