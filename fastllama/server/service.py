"""The server's side of the engine: what is admitted, what runs, and how it stops."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastllama.engine.any_engine import AnyEngine
from fastllama.engine.request import Request
from fastllama.openai_api.envelope import ServedModel
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.requests import ApiRequest, submit
from fastllama.server.errors import MODEL_NOT_FOUND, ApiError
from fastllama.server.metrics import Metrics
from fastllama.server.settings import ServerSettings

T = TypeVar("T")
SUBMITTING_THREADS = 4  # they compile grammars and encode prompts, which takes long for long ones
COMPUTING_THREADS = 2
LARGE_TOKENS = 1024  # of answers that are written in a thread; a token's alternatives count, too
POLL_SECONDS = 0.05
SMOOTHING = 0.1  # weight of the newest answer in the mean time of an answer
MAX_RETRY_SECONDS = 60


class Service:
    """An engine that runs in its own thread, and the limits of what it may be asked."""

    def __init__(self, engine: AnyEngine, served: ServedModel, settings: ServerSettings) -> None:
        self.engine, self.served, self.settings = engine, served, settings
        self.metrics = Metrics(served.name, engine)
        self.is_stopping = False
        self._n_submitting = 0  # answers that were admitted, and that the engine has not got
        self._n_in_work = 0  # requests whose answer is being generated or sent
        self._submitted: set[Request] = set()  # of those in work
        self._n_rows = engine.facts.max_batch_size
        self._answer_seconds = 1.0  # from an answer's first token to its end, smoothed
        self._threads = ThreadPoolExecutor(SUBMITTING_THREADS, "submit")
        self._computing = ThreadPoolExecutor(COMPUTING_THREADS, "compute")

    @property
    def n_open(self) -> int:
        """Answers that were admitted and have not ended. How fast clients read them does not matter."""
        return self._n_submitting + sum(one.n_open for one in tuple(self._submitted))

    def check_model(self, name: str | None) -> None:
        """Raise InvalidRequest for the name of a model that is not here."""
        if name is not None and name != self.served.name:
            raise InvalidRequest(
                f"the model {name[:100]!r} does not exist here: this server has {self.served.name!r}",
                param="model",
                code=MODEL_NOT_FOUND,
            )

    def check_serving(self) -> None:
        """Raise ApiError while the server stops, and once its engine has failed."""
        if self.is_stopping or self.engine.failure is not None:
            raise ApiError(
                503, "the server is stopping: send the request to another one", code="stopping", Retry_After="5"
            )

    @asynccontextmanager
    async def submitted(self, request: ApiRequest, *, is_quick: bool) -> AsyncIterator[list[Request]]:
        """Submit all prompts of a request. What has not ended at the end of the block is cancelled.

        is_quick: it has no grammar and short prompts.
        Raises InvalidRequest for a request that cannot be answered, and ApiError for one that cannot be admitted now.
        """
        self.check_serving()
        self.check_model(request.model)
        n_answers = len(request.prompts) * request.params.n
        self._check_queue(n_answers)
        self._n_in_work += 1
        requests: list[Request] = []
        try:
            requests = await self._submit(request, n_answers, is_quick)
            yield requests
        finally:
            self._n_in_work -= 1
            self._submitted.difference_update(requests)
            ended = [one for one in requests if one.is_finished]
            for one in requests:
                if one not in ended:
                    one.cancel()
                    one.tell(_AtEnd(one, self._note))
            await self.computed(self._note, ended, is_large=is_large(request, ended))

    async def prepared(self, function: Callable[..., T], *arguments: Any, is_quick: bool) -> T:
        """The result of a function, which runs in a thread unless it takes less time than a thread needs to wake."""
        return function(*arguments) if is_quick else await self.in_thread(function, *arguments)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a function that may take long, without blocking other requests."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def computed(self, function: Callable[..., T], *arguments: Any, is_large: bool) -> T:
        """The result of a function, which runs in a thread if it has much to do.

        Its threads have nothing else to do, so that a slow grammar holds up no other request.
        """
        if not is_large:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._computing, function, *arguments)

    async def drain(self) -> None:
        """Refuse new requests, and wait until what runs was sent, for as long as the settings say. Then cancel it."""
        self.is_stopping = True
        deadline = asyncio.get_running_loop().time() + self.settings.drain_seconds
        while self._n_in_work and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.to_thread(self.engine.close)  # not behind others' prompts

    async def _submit(self, request: ApiRequest, n_answers: int, is_quick: bool) -> list[Request]:
        def work() -> list[Request]:
            self.check_serving()
            return submit(self.engine, request, self.settings.max_prompt_tokens)

        try:
            requests = work() if is_quick else await self._submit_in_thread(work, n_answers)
        except RuntimeError:  # the engine was closed, or has failed, meanwhile
            self.check_serving()
            raise
        self._submitted.update(requests)
        return requests

    async def _submit_in_thread(self, work: Callable[[], list[Request]], n_answers: int) -> list[Request]:
        """Its answers count until the work is done, or was given up before it began, also if the client has gone."""
        loop, future = asyncio.get_running_loop(), self._threads.submit(work)

        def count_out() -> None:
            self._n_submitting -= n_answers

        def end(_: "Future[list[Request]]") -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(count_out)

        self._n_submitting += n_answers
        future.add_done_callback(end)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:  # the client has gone: nobody awaits what is submitted
            future.add_done_callback(_cancel_all)
            raise

    def _check_queue(self, n_answers: int) -> None:
        most = self._n_rows + self.settings.max_queue
        if n_answers > most:
            raise InvalidRequest(
                f"the request asks for {n_answers} answers, and this server takes up to {most} at a time "
                "(--max_batch_size and --max_queue): split it"
            )
        if self.n_open + n_answers > most:
            waits = self.n_open / self._n_rows * self._answer_seconds
            raise ApiError(
                429,
                f"the queue is full: {self.n_open} answers are running or waiting, of {most} (--max_queue): try again "
                "later",
                code="queue_full",
                Retry_After=str(min(max(1, math.ceil(waits)), MAX_RETRY_SECONDS)),
            )

    def _note(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.metrics.note(request)
            times, n_answers = request.partial.times, request.params.n
            if times.first_token is not None and times.end is not None:
                # Those of more answers than there are rows run one after the other.
                seconds = (times.end - times.first_token) / math.ceil(n_answers / self._n_rows)
                self._answer_seconds += (1 - (1 - SMOOTHING) ** n_answers) * (seconds - self._answer_seconds)


class _AtEnd:
    """Calls a function once, when a request that nobody reads has ended."""

    at_end = True

    def __init__(self, request: Request, function: Callable[[Sequence[Request]], None]) -> None:
        self._request, self._function = request, function
        self._is_done = False

    def set(self, *, at_once: bool) -> None:
        """An answer has ended."""
        if self._request.is_finished and not self._is_done:
            self._is_done = True
            self._function([self._request])


def is_large(request: ApiRequest, submitted: Sequence[Request]) -> bool:
    """Whether it takes long to write what has come of a request's answers."""
    return are_many(request, sum(len(answer.tokens) for one in submitted for answer in one.partial.answers))


def are_many(request: ApiRequest, n_tokens: int) -> bool:
    """Whether it takes long to write so many tokens of a request's answers, with their alternatives."""
    return n_tokens * (1 + (request.params.logprobs or 0)) > LARGE_TOKENS


def _cancel_all(submitting: "Future[list[Request]]") -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        for request in submitting.result():
            request.cancel()
