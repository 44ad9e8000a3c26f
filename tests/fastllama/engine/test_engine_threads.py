"""The engine's own thread: requests from many threads and from asyncio, cancelled, failed and closed."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastllama import Engine, Llama, SamplingParams
from fastllama.engine import Request
from fastllama.engine.model_runner import ModelRunner
from tests.fastllama.engine.llamas import answer_alone
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


def assert_all_alone(llm: Llama, found: list[list[int]]) -> None:
    for number, tokens in enumerate(found):
        assert tokens == answer_alone(llm, [5, number], params_of(number))[0]


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
        assert not request._wakes
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


def test_other_threads_get_their_turn_between_steps(engine: Engine) -> None:
    """Submitting waits for a step or a few, not for the end of all answers."""
    long = [engine.submit([5, number], ENDLESS) for number in range(4)]
    next(iter(long[0]))
    finished = []
    for number in range(20):
        request = engine.submit([6, number], SamplingParams(max_gen_len=1, seed=1))
        finished.append(all(one.is_finished for one in long))
        request.cancel()
    assert not all(finished)


def test_an_error_in_the_thread_reaches_every_request_and_the_next_works(
    llm: Llama, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ModelRunner.step
    begun = threading.Event()

    def failing(self: ModelRunner, sequences: Any) -> None:
        if begun.is_set():
            raise ArithmeticError("out of numbers")
        step(self, sequences)

    async def read(request: Request) -> None:
        await request.aresult()

    monkeypatch.setattr(ModelRunner, "step", failing)
    requests = [engine.submit([5, number], ENDLESS) for number in range(8)]
    next(iter(requests[0]))
    begun.set()
    for request in requests:
        with pytest.raises(ArithmeticError, match="out of numbers"):
            request.result()
        with pytest.raises(ArithmeticError, match="out of numbers"):
            asyncio.run(read(request))
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


def test_the_model_is_free_when_the_thread_has_nothing_to_do(llm: Llama, engine: Engine) -> None:
    engine.submit([5], params_of(1)).result()
    deadline = time.monotonic() + HANG_SECONDS
    while engine.stats.running and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(llm.generate([[5]], 3)[0][0]) == 3
    assert len(engine.submit([5], params_of(2)).result().answer.tokens) == 12
