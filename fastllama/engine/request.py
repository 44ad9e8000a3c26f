"""A request and its handle: what was asked, and the answers as they come."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fastllama.engine.commands import NewRequest
from fastllama.engine.messages import Update
from fastllama.engine.sequence import FinishReason, Increment, Sequence, TopLogprobs, joined
from fastllama.engine.wake import Wake
from fastllama.token_scores import TokenScore


class Runner(Protocol):
    """What a request needs of its engine."""

    @property
    def has_thread(self) -> bool:
        """Whether steps run without the request's doing."""

    def step(self) -> bool:
        """Run one step."""

    def cancel(self, request: "Request") -> None:
        """End the request's answers."""


class Listener(Protocol):
    """Learns that something has come, from the thread that brings it."""

    at_end: bool  # whether it wants to know the ends of answers only

    def set(self, *, at_once: bool) -> None:
        """Something has come. at_once: somebody waits for it."""


@dataclass
class Answer:
    """One answer of a request."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # never a stop token
    logprobs: list[float] | None = None  # one per token; None if they were not requested
    top_logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    error: str | None = None  # with finish_reason "error"

    def add(self, increment: Increment) -> None:
        """Add what was generated since."""
        self.text += increment.text
        self.tokens += increment.tokens
        if increment.logprobs is not None:
            self.logprobs = (self.logprobs or []) + increment.logprobs
        if increment.top_logprobs is not None:
            self.top_logprobs = (self.top_logprobs or []) + increment.top_logprobs
        self.finish_reason, self.stop_reason = increment.finish_reason, increment.stop_reason


@dataclass
class Times:
    """When things happened to a request, in seconds of time.perf_counter."""

    arrival: float
    first_token: float | None = None
    tokens: list[float] = field(default_factory=list)  # of the first answer
    end: float | None = None


@dataclass
class Result:
    """A request's answers."""

    prompt_tokens: list[int]
    answers: list[Answer]
    prompt_scores: list[TokenScore] | None = None  # of the prompt's last tokens, where they were requested
    cached_tokens: int = 0  # of the prompt, that were found in the cache
    times: Times = field(default_factory=lambda: Times(time.perf_counter()))

    @property
    def answer(self) -> Answer:
        """The first answer."""
        return self.answers[0]


class Request:
    """The handle of a submitted request.

    Iterating over it yields the increments of all answers and runs the engine meanwhile, unless the engine runs in its
    own thread. `async for` needs that thread. `result()` waits for the end. `cancel()` ends it.
    """

    def __init__(self, engine: Runner, command: NewRequest) -> None:
        """command: what was asked, with a number."""
        self.number, self.params = command.number, command.params
        self.sequences: list[Sequence] = []  # the answers, in the engine's process
        answers = [self._new_answer(index) for index in range(command.params.n)]
        scores: list[TokenScore] | None = [] if command.params.scores_prompt else None
        self.partial = Result(command.tokens, answers, scores)  # what has come so far
        self.error: Exception | None = None  # of the engine
        self._engine = engine
        self._increments: deque[Increment] = deque()
        self._n_open = len(answers)
        self._changed = threading.Condition()
        self._listeners: set[Listener] = set()

    @property
    def n_open(self) -> int:
        """Answers that have not ended."""
        return self._n_open

    @property
    def is_finished(self) -> bool:
        """Whether all answers have ended."""
        return self._n_open == 0 or self.error is not None

    def result(self) -> Result:
        """Wait for the end of all answers."""
        for _ in self:
            pass
        return self.partial

    def cancel(self) -> None:
        """End all answers that are not finished. Their last increment has the finish reason "cancelled"."""
        self._engine.cancel(self)

    def __iter__(self) -> Iterator[Increment]:
        while True:
            increment, is_last = self._next()
            if increment is not None:
                yield increment
            elif is_last:
                self.raise_error()
                return
            elif self._engine.has_thread:
                with self._changed:
                    self._changed.wait_for(lambda: self._increments or self.is_finished)
            elif not self._engine.step() and not self.is_finished:
                raise RuntimeError("the engine does not run this request any more: submit it again")

    async def __aiter__(self) -> AsyncIterator[Increment]:
        async for increments in merged([self]):
            for _, increment in increments:
                yield increment

    async def aresult(self) -> Result:
        """Wait for the end of all answers, without blocking other tasks."""
        wake = Wake(at_end=True)
        with self.waking(wake):
            while not self.is_finished:
                await wake.wait()
        with self._changed:
            self._increments.clear()
        self.raise_error()
        return self.partial

    def take(self) -> list[Increment]:
        """What has come and was not read: one increment for each answer."""
        with self._changed:
            increments = list(self._increments)
            self._increments.clear()
        return joined(increments)

    @contextlib.contextmanager
    def waking(self, wake: Wake) -> Iterator[None]:
        """A block in which `wake` is set whenever something has come."""
        if not (self.is_finished or self._engine.has_thread):
            raise RuntimeError("`async for` needs an engine that runs in its own thread: call engine.start() first")
        self.tell(wake)
        try:
            yield
        finally:
            with self._changed:
                self._listeners.discard(wake)

    def tell(self, listener: Listener) -> None:
        """Tell a listener of what comes, and of what has come and was not read."""
        with self._changed:
            self._listeners.add(listener)
            has_end = self.is_finished or self._n_open < len(self.partial.answers)
            if has_end or (self._increments and not listener.at_end):
                listener.set(at_once=True)

    def raise_error(self) -> None:
        """Raise the engine's error, if it has failed."""
        if self.error is not None:
            raise self.error

    # The engine calls these.

    def add(self, increment: Increment) -> None:
        """Take an increment of one answer."""
        now, times = time.perf_counter(), self.partial.times
        is_first = times.first_token is None
        self.partial.answers[increment.index].add(increment)
        if increment.tokens:
            times.first_token = times.first_token or now
            if increment.index == 0:
                times.tokens.append(now)
        with self._changed:
            self._increments.append(increment)
            self._n_open -= increment.finish_reason is not None
            if not self._n_open:
                times.end = now
        self._notify(at_once=is_first or self.is_finished, is_end=increment.finish_reason is not None)

    def receive(self, update: Update) -> None:
        """Take what has come from the engine's process."""
        partial, times = self.partial, self.partial.times
        is_first = times.first_token is None
        times.first_token, times.end = update.first_token, update.end
        times.tokens += update.token_times
        partial.cached_tokens = update.cached_tokens
        if update.prompt_scores:
            partial.prompt_scores = (partial.prompt_scores or []) + update.prompt_scores
        for index, error in update.errors.items():
            partial.answers[index].error = error
        for increment in update.increments:
            partial.answers[increment.index].add(increment)
        n_ended = sum(increment.finish_reason is not None for increment in update.increments)
        with self._changed:
            self._increments += update.increments
            self._n_open -= n_ended
        self._notify(at_once=is_first or self.is_finished, is_end=n_ended > 0)

    def fail(self, error: Exception) -> None:
        """The engine has failed: whoever waits for this request gets its error."""
        self.error = error
        self._notify(at_once=True, is_end=True)

    def _notify(self, *, at_once: bool, is_end: bool) -> None:
        with self._changed:
            self._changed.notify_all()
            for listener in tuple(self._listeners):
                if is_end or not listener.at_end:
                    listener.set(at_once=at_once)

    def _next(self) -> tuple[Increment | None, bool]:
        """The next increment, or None and whether there will be none."""
        with self._changed:
            return (self._increments.popleft(), False) if self._increments else (None, self.is_finished)

    def _new_answer(self, index: int) -> Answer:
        wanted = self.params.logprobs
        return Answer(index, logprobs=None if wanted is None else [], top_logprobs=[] if wanted else None)


class Numbered(NamedTuple):
    """An increment, and the number of its request."""

    number: int
    increment: Increment


async def merged(requests: Items[Request]) -> AsyncIterator[list[Numbered]]:
    """What has come of any of the requests since the last time, as soon as there is something.

    Raises the engine's error, if it has failed.
    """
    wake = Wake()
    with contextlib.ExitStack() as stack:
        for request in requests:
            stack.enter_context(request.waking(wake))
        while True:
            are_finished = all(request.is_finished for request in requests)  # before the increments are taken
            if found := [Numbered(number, one) for number, request in enumerate(requests) for one in request.take()]:
                yield found
            elif are_finished:
                for request in requests:
                    request.raise_error()
                return
            else:
                await wake.wait()
