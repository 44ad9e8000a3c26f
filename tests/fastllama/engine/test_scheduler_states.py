"""Any sequence of submissions, cancellations, steps and errors, on a simulated device that checks every page."""

from collections import Counter
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fastllama.engine import Request, SamplingParams
from fastllama.kernels.paged_cache import pages_for
from tests.fastllama.engine.simulated import (
    ROOT,
    Runner,
    answer_alone,
    following,
    letters,
    score_of,
    simulated_engine,
    small_pages,
)

MAX_SEQ_LEN = 30
STEMS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6, 7, 8, 14, 13, 12, 11], [9] * 12]

REQUESTS = st.fixed_dictionaries(
    {
        "stem": st.integers(0, len(STEMS) - 1),
        "common": st.integers(0, 12),
        "tail": st.lists(st.integers(0, 14), min_size=1, max_size=9),
        "max_gen_len": st.sampled_from([None, None, 12, 3, 1, 0]),
        "stop": st.sampled_from([(), ("b",), ("gh", "ab"), ("c", "bc")]),
        "stop_token_ids": st.sampled_from([(), (3,), (0, 7)]),
        "n": st.integers(1, 2),
        "ignore_eos": st.booleans(),
        "scored": st.booleans(),
        "echo": st.booleans(),
        "lengths": st.sampled_from([None, None, None, (1, 40), (2, 9), (25, 29)]),
    }
)


class Traffic(RuleBasedStateMachine):
    """What an engine promises, after every rule."""

    requests_made: ClassVar[int] = 0
    preemptions: ClassVar[int] = 0
    cached_tokens: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.patches = small_pages()
        self.patches.__enter__()
        self.open: list[Request] = []
        self.cancelled: set[int] = set()
        self.n_failures = 0  # that may have ended a request
        self.lengths: dict[int, tuple[int, int] | None] = {}  # of the grammars' texts, by request
        self.last_running: list[int] = []

    @initialize(
        rows=st.sampled_from([4, 3, 2, 1]),
        pages=st.sampled_from([8, 9, 10, 12, 5]),
        ahead=st.integers(0, 2),
        steps=st.sampled_from([(1, 0), (1, 1), (1, 5), (2, 0), (3, 0)]),
        step_tokens=st.integers(1, 12),
        reuse=st.sampled_from([True, True, True, False]),
    )
    def make_engine(self, steps: tuple[int, int], **sizes: Any) -> None:
        unroll, n_guesses = steps
        self.engine = simulated_engine(max_seq_len=MAX_SEQ_LEN, unroll=unroll, n_guesses=n_guesses, **sizes)

    @rule(asked=st.lists(REQUESTS, min_size=1, max_size=8))
    def submit(self, asked: list[dict[str, Any]]) -> None:
        for one in asked:
            prompt = STEMS[one["stem"]][: one["common"]] + one["tail"]
            params = SamplingParams(
                prompt_logprobs=0 if one["scored"] else None,
                logprobs=0,
                grammar=None if one["lengths"] is None else letters(one["lengths"]),
                **{name: one[name] for name in ("max_gen_len", "stop", "stop_token_ids", "n", "echo", "ignore_eos")},
            )
            room = MAX_SEQ_LEN - len(prompt)
            budget = room if params.max_gen_len is None else min(room, params.max_gen_len)
            Traffic.requests_made += 1
            if pages_for(len(prompt) - 1 + budget) > self.engine.stats.pages:
                with pytest.raises(ValueError, match="and the cache|positions of the cache, which has"):
                    self.engine.submit(prompt, params)
            else:
                self.open.append(self.engine.submit(prompt, params))
                self.lengths[self.open[-1].number] = one["lengths"]

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            unfinished = [request for request in self.open if not request.is_finished]
            assert self.engine.step() == any(not request.is_finished for request in unfinished)
            still = [request for request in unfinished if not request.is_finished]
            if still and not self.isolates:
                oldest = next(one for one in still[0].sequences if one.finish_reason is None)
                scheduler = self.engine._core.scheduler
                assert oldest in scheduler.running or not scheduler.running, "the oldest is always served"
        self.collect()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.open))
        request.cancel()
        assert request.is_finished
        self.cancelled.add(request.number)
        self.collect()

    @precondition(lambda self: self.open)
    @rule(where=st.sampled_from(["prefill", "step", "receive"]))
    def break_a_step(self, where: str) -> None:
        runner: Runner = self.engine.llm.decoder.runner  # type: ignore[attr-defined]
        runner.fails_in = where
        while runner.fails_in and self.engine.step():
            pass
        self.n_failures += not runner.fails_in
        runner.fails_in = ""
        self.collect()

    @precondition(lambda self: not self.open)
    @rule()
    def forget(self) -> None:
        """As other weights do."""
        self.engine._core.scheduler.pool.forget()
        self.engine.llm.decoder.runner.memory.clear()  # type: ignore[attr-defined]

    @rule()
    def drain(self) -> None:
        limit = sum((MAX_SEQ_LEN + 4) * 4 for request in self.open for _ in request.sequences)
        for _ in range(limit + 1):
            if not self.engine.step():
                break
        assert all(request.is_finished for request in self.open), "a deadlock"
        self.collect()
        assert not self.open

    def collect(self) -> None:
        """Check the requests that have ended."""
        for request in [request for request in self.open if request.is_finished]:
            self.open.remove(request)
            self.check(request)

    def check(self, request: Request) -> None:
        increments = list(request)
        result, prompt = request.result(), request.partial.prompt_tokens
        ends = Counter(one.index for one in increments if one.finish_reason is not None)
        assert ends == Counter(range(request.params.n)), "every answer ends once"
        n_errors = 0
        for answer in result.answers:
            lengths = self.lengths[request.number]
            tokens, reason, stop = answer_alone(prompt, request.params, answer.index, MAX_SEQ_LEN, lengths)
            mine = [one for one in increments if one.index == answer.index]
            assert "".join(one.text for one in mine) == answer.text
            if answer.finish_reason == "error":
                assert str(answer.error).startswith("ArithmeticError: as planned, in ")
                whole = prompt + tokens if request.params.echo else tokens
                assert answer.tokens == whole[: len(answer.tokens)]
                n_errors += 1
                continue
            assert answer.error is None
            if request.number in self.cancelled and answer.finish_reason == "cancelled":
                has_begun = len(answer.tokens) > 0
                expected = (prompt + tokens if request.params.echo else tokens)[: len(answer.tokens)]
                assert answer.tokens == expected or (not has_begun)
                continue
            assert answer.tokens == (prompt + tokens if request.params.echo else tokens)
            assert answer.text == "".join(chr(ord("a") + token) for token in answer.tokens)
            assert (answer.finish_reason, answer.stop_reason) == (reason, stop)
            assert len(answer.logprobs or []) == len(answer.tokens)
        self.n_failures -= n_errors > 0
        assert self.n_failures >= 0, "a failure ends one request at most"
        ended = {answer.finish_reason for answer in result.answers} <= {"stop", "length"}
        if request.params.prompt_logprobs is not None and ended:
            number, expected_scores = ROOT, []
            for token, target in pairwise(prompt):
                number = following(number, token)
                expected_scores.append(score_of(number, target))
            assert [score.logprob for score in result.prompt_scores or []] == expected_scores
        assert result.cached_tokens < max(2, len(prompt))

    @invariant()
    def pages_are_counted(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine._core.scheduler
        pool, running = scheduler.pool, scheduler.running
        users = Counter(page for one in running for page in one.pages)
        assert pool._users == [users[page] for page in range(pool.n_pages)]
        free, unused = list(pool._free), list(pool._unused)
        assert sorted([*free, *unused, *users]) == list(range(pool.n_pages)), "every page is in one place"
        assert pool._page_of == {digest: page for page, digest in pool._digest_of.items()}
        assert set(unused) <= set(pool._digest_of) and not set(free) & set(pool._digest_of)
        for one in running:
            for page in one.pages[one.n_computed // 4 :]:
                assert users[page] == 1 and page not in pool._digest_of, "a page that is not full has one writer"

    @invariant()
    def rows_and_order_are_kept(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine._core.scheduler
        rows = [one.placed_row for one in scheduler.running]
        assert sorted([*rows, *scheduler._free_rows]) == list(range(len(rows) + len(scheduler._free_rows)))
        assert {row for row, _ in scheduler.new_entries} <= set(rows), "a row that is free has no pages"
        arrivals = [one.arrival for one in [*scheduler.running, *scheduler.waiting]]
        assert self.isolates or arrivals == sorted(arrivals), "who came first runs first"
        assert len(rows) <= 1 or not self.isolates, "a suspect runs alone"
        assert {one.arrival for one in self.engine._core.requests} == set(arrivals)
        assert (self.engine._held is not None) == bool(arrivals), "the model is held while there are requests"

    @property
    def isolates(self) -> bool:
        """Whether suspects of a failure run, one at a time."""
        return self.engine._core._suspects.first is not None

    def teardown(self) -> None:
        try:
            if hasattr(self, "engine"):
                self.drain()
                self.pages_are_counted()
                assert (
                    self.engine.stats.used_pages == 0
                    and self.engine._core.scheduler.pool.n_available == self.engine.stats.pages
                )
                Traffic.preemptions += self.engine.stats.preemptions
                Traffic.cached_tokens += self.engine.stats.cached_tokens
        finally:
            self.patches.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("examples", "least"),
    [pytest.param(40, 500, id="quick"), pytest.param(900, 10_000, id="all", marks=pytest.mark.slow)],
)
def test_any_traffic_keeps_every_page_and_every_answer(examples: int, least: int) -> None:
    Traffic.requests_made = Traffic.preemptions = Traffic.cached_tokens = 0
    run_state_machine_as_test(Traffic, settings=settings(max_examples=examples, stateful_step_count=40))
    assert Traffic.requests_made >= least
    assert Traffic.preemptions > least // 50 and Traffic.cached_tokens > least // 20
