"""Which requests end after a failure, without tensors: every page is checked, and the host is behind the device."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from fastllama import Engine, SamplingParams
from fastllama.distributed.model_parallel import Group
from fastllama.engine import Request
from fastllama.engine.sequence import Sequence as Answering
from tests.fastllama.engine.simulated import answer_alone, simulated_engine, small_pages


@pytest.fixture
def pages() -> Iterator[None]:
    with small_pages():
        yield


def small_engine(breaks: Callable[[str, list[Answering]], bool], *, rows: int = 4, **options: Any) -> Engine:
    engine = simulated_engine(rows=rows, pages=40, max_seq_len=40, **options)
    engine.llm.decoder.runner.breaks = breaks  # type: ignore[attr-defined]
    return engine


def prompts_of(together: list[Answering]) -> set[int]:
    """The first token of each prompt."""
    return {one.tokens[0] for one in together}


def assert_simulated(request: Request, *, has_failed: bool = False) -> None:
    for answer in request.result().answers:
        tokens, reason, _ = answer_alone(request.partial.prompt_tokens, request.params, answer.index, 40)
        if has_failed:
            assert answer.finish_reason == "error" and answer.tokens == tokens[: len(answer.tokens)]
        else:
            assert (answer.tokens, answer.finish_reason) == (tokens, reason)


SHORT = SamplingParams(max_gen_len=12, ignore_eos=True)


@pytest.mark.parametrize("where", ["prefill", "step", "receive"])
@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize(("ahead", "unroll", "n_guesses"), [(0, 1, 0), (2, 1, 0), (2, 2, 0), (2, 1, 4)])
@pytest.mark.usefixtures("pages")
def test_one_sequence_breaks_any_launch(where: str, at: int, ahead: int, unroll: int, n_guesses: int) -> None:
    engine = small_engine(
        lambda place, together: (
            place == where and any(one.tokens[0] == 3 and one.n_generated >= at for one in together)
        ),
        ahead=ahead,
        unroll=unroll,
        n_guesses=n_guesses,
    )
    requests = [engine.submit([number, *[1, 2, 3] * number], SHORT) for number in range(8)]
    engine.run()
    for number, request in enumerate(requests):
        assert_simulated(request, has_failed=number == 3 and (where != "prefill" or at == 0))
    assert engine.stats[:3] == (0, 0, 0) and engine._core.scheduler.pool.n_available == 40


@pytest.mark.usefixtures("pages")
def test_two_that_break_only_together_are_answered_or_end_and_nobody_waits_for_ever() -> None:
    for rows, pair, may_fail in ((3, {0, 1}, set()), (3, {1, 2}, set()), (6, {0, 5}, set()), (6, {0, 1}, {0, 1, 2})):
        engine = small_engine(lambda where, together, pair=pair: pair <= prompts_of(together), rows=rows)  # type: ignore[misc]
        requests = [engine.submit([number, 1, 2, number], SHORT) for number in range(8)]
        engine.run()
        broken = {number for number, request in enumerate(requests) if request.result().answer.error is not None}
        assert broken == may_fail
        for number, request in enumerate(requests):
            assert_simulated(request, has_failed=number in broken)


@pytest.mark.usefixtures("pages")
def test_whoever_was_part_of_three_failures_ends() -> None:
    """Every launch of two fails."""
    launches: list[int] = []

    def breaks(where: str, together: list[Answering]) -> bool:
        launches.append(len(together))
        return len(together) > 1

    engine = small_engine(breaks)
    requests = [engine.submit([number, 1, 2], SHORT) for number in range(4)]
    engine.run()
    broken = [request.result().answer.error is not None for request in requests]
    assert broken == [True, True, False, False] and sum(count > 1 for count in launches) == 3
    later = [engine.submit([number, 1, 2], SHORT) for number in range(2)]
    engine.run()
    assert all(request.is_finished for request in later)


@pytest.mark.usefixtures("pages")
def test_new_requests_wait_until_all_suspects_are_cleared() -> None:
    engine = small_engine(lambda where, together: where == "step" and 2 in prompts_of(together))
    requests = [engine.submit([number, 1, 2, number], SHORT) for number in range(3)]
    engine.step()
    core = engine._core
    assert core._suspects.first is requests[0].sequences[0]
    late = engine.submit([9, 9], SHORT)
    requests[1].cancel()
    alone: list[set[int]] = []
    while core._suspects.first is not None:
        engine.step()
        alone.append(prompts_of(core.scheduler.running))
        assert late.sequences[0].row is None or core._suspects.first is None
    assert next(one for one in alone if one) == {0}
    engine.run()
    assert requests[1].result().answer.finish_reason == "cancelled"
    assert_simulated(requests[0])
    assert_simulated(requests[2], has_failed=True)
    assert_simulated(late)


@pytest.mark.usefixtures("pages")
def test_a_cancellation_that_fails_on_the_device_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(lambda where, together: False)
    requests = [engine.submit([number, 1, 2, number], SamplingParams(max_gen_len=12, n=2)) for number in range(2)]
    engine.step()
    engine.step()
    runner = engine.llm.decoder.runner  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:

        def failing(rows: Sequence[int]) -> None:
            patch.undo()
            raise ArithmeticError("as planned")

        patch.setattr(runner, "stop", failing)
        requests[0].cancel()
    engine.run()
    assert {answer.finish_reason for answer in requests[0].result().answers} == {"cancelled"}
    for answer in requests[1].result().answers:
        assert answer.tokens == answer_alone([1, 1, 2, 1], requests[1].params, answer.index, 40)[0]
    assert engine._core.scheduler.pool.n_available == 40


@pytest.mark.usefixtures("pages")
def test_processes_that_share_a_model_do_not_go_on_after_a_failure() -> None:
    engine = small_engine(lambda where, together: 2 in prompts_of(together))
    engine.llm.model.group = Group(0, 2)
    requests = [engine.submit([number, 1, 2, number], SHORT) for number in range(3)]
    with pytest.raises(ArithmeticError, match="as planned"):
        engine.run()
    for request in requests:
        with pytest.raises(ArithmeticError, match="as planned"):
            request.result()
    assert isinstance(engine.failure, ArithmeticError) and engine.stats[:3] == (0, 0, 0)


@pytest.mark.parametrize("error", [ValueError("no such token"), MemoryError()], ids=["error", "memory"])
@pytest.mark.usefixtures("pages")
def test_processes_that_share_a_model_agree_about_an_answer_that_ends_alone(error: Exception) -> None:
    """An error that follows from the tokens comes in all processes. A lack of memory does not."""
    engine = small_engine(lambda where, together: False)
    engine.llm.model.group = Group(0, 2)
    requests = [engine.submit([number, 1, 2, number], SHORT) for number in range(3)]

    def push(ids: Sequence[int]) -> str:
        raise error

    requests[1].sequences[0].text.push = push  # type: ignore[method-assign, assignment]
    if isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            engine.run()
        assert isinstance(engine.failure, MemoryError)
        return
    engine.run()
    assert requests[1].result().answer.error == "ValueError: no such token"
    for number in (0, 2):
        assert_simulated(requests[number])
