"""The engine's own thread: requests from many threads and from asyncio, cancelled, failed and closed."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Engine, Llama, SamplingParams
from fastllama.engine import Answer, Request
from fastllama.engine.model_runner import ModelRunner
from tests.fastllama.engine.llamas import answer_alone, engine_llama
from tests.support.timeouts import HANG_SECONDS

ENDLESS = SamplingParams(max_gen_len=200, temperature=1.0, seed=1)


def params_of(number: int) -> SamplingParams:
    return SamplingParams(max_gen_len=10 + number, temperature=1.0, seed=number, logprobs=0)


@pytest.fixture
def engine(llm: Llama) -> Iterator[Engine]:
    with llm.engine().start() as engine:
        yield engine
    assert not any(thread.name == "fastllama engine" for thread in threading.enumerate())


def in_threads(tasks: list[Callable[[], Any]]) -> list[Any]:
    """The results of functions, each in its own thread."""
    results: list[Any] = [None] * len(tasks)

    def run(place: int) -> None:
        try:
            results[place] = tasks[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    return results


def assert_all_alone(
    llm: Llama, found: list[list[int]], requests: Iterable[tuple[Request, list[int], int]] = ()
) -> None:
    """Assert that answers are those of the same prompts alone."""
    results = [(tokens, [5, number], number) for number, tokens in enumerate(found)]
    results += [(request.result().answer.tokens, prompt, number) for request, prompt, number in requests]
    wait_until_idle(llm)
    for tokens, prompt, number in results:
        assert tokens == answer_alone(llm, prompt, params_of(number))[0]


def wait_until_idle(llm: Llama) -> None:
    """The engine's thread frees the model a moment after the last request has ended."""
    deadline = time.monotonic() + HANG_SECONDS
    while llm.model._lock.locked() and time.monotonic() < deadline:
        time.sleep(0.001)


def test_many_threads_submit_and_read(llm: Llama) -> None:
    def ask(engine: Engine, number: int) -> list[int]:
        if number % 2:
            return engine.submit([5, number], params_of(number)).result().answer.tokens
        return [token for one in engine.submit([5, number], params_of(number)) for token in one.tokens]

    with llm.engine().start() as engine:
        assert engine.has_thread and engine.start() is engine
        found = in_threads([lambda number=number: ask(engine, number) for number in range(16)])  # type: ignore[misc]
        assert engine.stats.finished_requests == 16
    assert_all_alone(llm, found)


def test_many_tasks_of_asyncio_submit_and_read(llm: Llama) -> None:
    async def ask(engine: Engine, number: int) -> list[int]:
        request = engine.submit([5, number], params_of(number))
        if number % 2:
            return (await request.aresult()).answer.tokens
        return [token async for one in request for token in one.tokens]

    async def ask_all(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*(ask(engine, number) for number in range(16)))

    with llm.engine().start() as engine:
        found = asyncio.run(ask_all(engine))
    assert_all_alone(llm, found)


def test_every_increment_reaches_its_reader(engine: Engine) -> None:
    """The last ones too, which come while the reader finds nothing new."""
    for number in range(60):
        request = engine.submit([5, number], SamplingParams(max_gen_len=1 + number % 3, seed=1))
        increments = list(request)
        assert [one.finish_reason for one in increments if one.finish_reason] == ["length"]
        assert [token for one in increments for token in one.tokens] == request.result().answer.tokens


def test_two_tasks_may_wait_for_one_request(engine: Engine) -> None:
    async def wait() -> list[Any]:
        request = engine.submit([5], SamplingParams(max_gen_len=30, seed=1))
        async with asyncio.timeout(HANG_SECONDS):
            return await asyncio.gather(*(request.aresult() for _ in range(3)))

    results = asyncio.run(wait())
    assert results[0] is results[1] is results[2] and len(results[0].answer.tokens) == 30


def test_async_iteration_needs_the_thread(llm: Llama) -> None:
    async def read(request: Request) -> None:
        async for _ in request:
            pass

    engine = llm.engine()
    request = engine.submit([5], ENDLESS)
    with pytest.raises(
        RuntimeError, match="`async for` needs an engine that runs in its own thread: call engine.start"
    ):
        asyncio.run(read(request))
    engine.close()


def test_a_request_is_cancelled_from_another_thread(engine: Engine) -> None:
    requests = [engine.submit([5, number], ENDLESS) for number in range(12)]
    running, waiting = requests[0], requests[-1]
    next(iter(running))
    results = in_threads([running.result, waiting.result, running.cancel, waiting.cancel])
    assert [result.answer.finish_reason for result in results[:2]] == ["cancelled", "cancelled"]
    assert 0 < len(results[0].answer.tokens) < 200


def test_a_request_is_cancelled_from_asyncio(engine: Engine) -> None:
    async def read() -> list[str | None]:
        request, other = engine.submit([5], ENDLESS), engine.submit([6], params_of(3))
        reasons: list[str | None] = []
        async for increment in request:
            reasons.append(increment.finish_reason)
            request.cancel()
        await other.aresult()
        return reasons

    assert asyncio.run(read())[-1] == "cancelled"


def test_a_task_that_is_cancelled_leaves_the_engine_working(engine: Engine) -> None:
    async def read() -> int:
        request = engine.submit([5], ENDLESS)
        task = asyncio.create_task(request.aresult())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not request._listeners
        return len((await request.aresult()).answer.tokens)

    assert asyncio.run(read()) == 200


def test_closing_ends_open_requests_and_their_readers(llm: Llama) -> None:
    engine = llm.engine().start()
    requests = [engine.submit([5, number], ENDLESS) for number in range(60)]  # many more than run before the close
    next(iter(requests[0]))
    results = in_threads([*(request.result for request in requests), engine.close])
    assert {result.answer.finish_reason for result in results[:-1]} <= {"cancelled", "length"}
    assert not engine.has_thread and results[-2].answer.finish_reason == "cancelled"
    assert len(llm.generate([[5]], 3)[0][0]) == 3


class HeldStep:
    """Steps of the engine wait in the model until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        step = ModelRunner.step

        def held(runner: ModelRunner, sequences: Any) -> None:
            self.has_begun.set()
            assert self.may_go_on.wait(HANG_SECONDS)
            step(runner, sequences)

        monkeypatch.setattr(ModelRunner, "step", held)


def test_no_call_waits_for_the_step_that_runs(llm: Llama, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldStep(monkeypatch)
    running = engine.submit([5], ENDLESS)
    assert held.has_begun.wait(HANG_SECONDS)
    # All of this would hang, if it waited.
    submitted = [engine.submit([6, number], params_of(number)) for number in range(3)]
    dropped = engine.submit([7], params_of(1))
    dropped.cancel()
    running.cancel()
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit([])
    with pytest.raises(ValueError, match="the prompt has 300 tokens, more than the max_seq_len of 256"):
        engine.submit([5] * 300)
    with pytest.raises(RuntimeError, match="this model is busy"):
        llm.generate([[5]], 3)
    assert engine.stats[:2] == (1, 4) and not running.is_finished and not dropped.is_finished
    held.may_go_on.set()
    assert dropped.result().answer.finish_reason == "cancelled" and dropped.result().answer.tokens == []
    assert running.result().answer.finish_reason == "cancelled"
    assert_all_alone(llm, [], [(request, [6, number], number) for number, request in enumerate(submitted)])


def test_a_request_that_the_cache_can_never_hold_is_refused_at_once(tmp_path: Path) -> None:
    with engine_llama(tmp_path, cache_tokens=128).engine().start() as engine:
        with pytest.raises(ValueError, match="needs up to 149 positions of the cache, which has 128"):
            engine.submit([9] * 100, SamplingParams(max_gen_len=50))
        assert engine.stats[:2] == (0, 0)


def test_draws_without_a_seed_follow_the_order_of_submission(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of requests that come while a step runs."""
    params = SamplingParams(max_gen_len=8, temperature=1.0)
    streams: list[list[Any]] = []
    for count in (1, 6):
        calls: list[Any] = []
        with monkeypatch.context() as patch:
            held = HeldStep(patch)
            random_streams = llm.random_streams

            def noted(seed: Any, n: int, calls: list[Any] = calls, drawn: Any = random_streams) -> Any:
                calls.append(drawn(seed, n))
                return calls[-1]

            patch.setattr(llm, "random_streams", noted)
            with llm.engine().start() as engine:
                first = [engine.submit([5], params) for _ in range(count)]
                assert held.has_begun.wait(HANG_SECONDS)
                rest = [engine.submit([5], params) for _ in range(6 - count)]
                held.may_go_on.set()
                used = [one.stream for request in first + rest for one in request.sequences]
                arrivals = [one.arrival for request in first + rest for one in request.sequences]
                assert all(len(request.result().answer.tokens) == 8 for request in first + rest)
        assert used == [stream for drawn in calls for stream in drawn] and arrivals == sorted(arrivals)
        streams.append(used)
    assert len({stream for used in streams for stream in used}) == 12, "each draws for itself"


def test_closing_during_a_step_loses_nothing(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldStep(monkeypatch)
    engine = llm.engine().start()
    requests = [engine.submit([5], SamplingParams(max_gen_len=100, n=2, seed=1))]
    assert held.has_begun.wait(HANG_SECONDS)
    requests += [engine.submit([6, number], ENDLESS) for number in range(9)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closing:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="the engine is closed: make another"):
        engine.submit([5])
    held.may_go_on.set()
    closing.join(HANG_SECONDS)
    assert not closing.is_alive() and not engine.has_thread
    reasons = [answer.finish_reason for request in requests for answer in request.result().answers]
    assert reasons == ["cancelled"] * 11 and engine.stats[:3] == (0, 0, 0)
    requests[0].cancel()
    llm.model.check_idle()


def test_an_error_that_cannot_be_survived_ends_the_engine(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldStep(monkeypatch)
    error = torch.AcceleratorError("the device is lost")

    def failing(runner: ModelRunner) -> Any:
        raise error

    monkeypatch.setattr(ModelRunner, "receive", failing)
    engine = llm.engine().start()
    requests = [engine.submit([5], ENDLESS)]
    assert held.has_begun.wait(HANG_SECONDS)
    requests.append(engine.submit([6], ENDLESS))
    assert engine.failure is None
    held.may_go_on.set()
    for request in requests:
        with pytest.raises(torch.AcceleratorError, match="the device is lost"):
            request.result()
    assert engine.failure is error and engine.stats[:3] == (0, 0, 0)
    with pytest.raises(RuntimeError, match=r"the engine has failed \(AcceleratorError\('the device is lost'\)\): make"):
        engine.submit([5])
    engine.close()
    llm.model.check_idle()


def test_an_error_outside_of_a_steps_work_ends_the_engine(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise MemoryError("as planned")

    with monkeypatch.context() as patch:
        patch.setattr("fastllama.engine.engine.default_settings", broken)
        engine = llm.engine().start()
        request = engine.submit([5], ENDLESS)
        with pytest.raises(MemoryError, match="as planned"):
            request.result()
        assert isinstance(engine.failure, MemoryError)
        with pytest.raises(RuntimeError, match="has failed"):
            engine.submit([5], ENDLESS)
        engine.close()
    llm.model.check_idle()


@pytest.mark.parametrize("has_thread", [False, True])
def test_a_request_that_cannot_be_made_leaves_the_model_free(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, has_thread: bool
) -> None:
    def broken(**arguments: Any) -> Any:
        raise MemoryError("as planned")

    with llm.engine() as engine:
        if has_thread:
            engine.start()
        with monkeypatch.context() as patch:
            patch.setattr("fastllama.engine.commands.Sequence", broken)
            with pytest.raises(MemoryError, match="as planned"):
                engine.submit([5], ENDLESS)
        llm.model.check_idle()
        assert len(engine.submit([5], params_of(1)).result().answer.tokens) == 11


def test_answers_can_be_awaited_after_the_engine_was_closed(llm: Llama) -> None:
    with llm.engine().start() as engine:
        whole, cut = engine.submit([5, 1], params_of(1)), engine.submit([5], ENDLESS)
        whole.result()
        next(iter(cut))

    async def read() -> tuple[Any, list[Any]]:
        return await whole.aresult(), [one async for one in cut]

    result, (last,) = asyncio.run(read())
    assert (result.answer.finish_reason, last.finish_reason) == ("length", "cancelled")


def test_an_error_in_the_thread_reaches_every_request_and_the_next_works(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ModelRunner.step
    begun = threading.Event()

    def failing(self: ModelRunner, sequences: Any) -> None:
        if begun.is_set():
            raise ArithmeticError("out of numbers")
        step(self, sequences)

    async def read(request: Request) -> Answer:
        return (await request.aresult()).answer

    monkeypatch.setattr(ModelRunner, "step", failing)
    requests = [engine.submit([5, number], ENDLESS) for number in range(8)]
    next(iter(requests[0]))
    begun.set()
    for request in requests:
        answer = request.result().answer
        assert asyncio.run(read(request)) is answer
        assert (answer.finish_reason, answer.error) == ("error", "ArithmeticError: out of numbers")
    begun.clear()
    assert (
        engine.submit([5, 3], params_of(3)).result().answer.tokens
        == engine.submit([5, 3], params_of(3)).result().answer.tokens
    )


def test_a_loop_that_was_closed_does_not_disturb_the_engine(engine: Engine) -> None:
    request = engine.submit([5], ENDLESS)
    loop = asyncio.new_event_loop()
    iterator = request.__aiter__()
    loop.run_until_complete(iterator.__anext__())
    loop.close()
    other = engine.submit([6], params_of(5))
    assert len(other.result().answer.tokens) == 15 and len(request.result().answer.tokens) == 200


def test_a_loop_that_has_ended_is_not_kept(engine: Engine) -> None:
    loops: list[Any] = []

    async def read() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        async for _ in engine.submit([5], params_of(3)):
            pass

    asyncio.run(read())
    gc.collect()
    assert loops[0]() is None


def test_the_model_is_free_when_the_thread_has_nothing_to_do(llm: Llama, engine: Engine) -> None:
    engine.submit([5], params_of(1)).result()
    wait_until_idle(llm)
    assert len(llm.generate([[5]], 3)[0][0]) == 3
    assert len(engine.submit([5], params_of(2)).result().answer.tokens) == 12
