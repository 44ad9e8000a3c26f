"""The server's side of the engine: what is admitted, what runs, and how it stops."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastllama.engine.engine import Engine
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

    def __init__(self, engine: Engine, served: ServedModel, settings: ServerSettings) -> None:
        self.engine, self.served, self.settings = engine, served, settings
        self.metrics = Metrics(served.name, engine)
        self.is_stopping = False
        self._n_submitting = 0  # answers that were admitted, and that the engine has not got
        self._n_in_work = 0  # requests whose answer is being generated or sent
        self._submitted: set[Request] = set()  # of those in work
        self._n_rows = engine.llm.model.params.max_batch_size
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
    async def submitted(self, request: ApiRequest) -> AsyncIterator[list[Request]]:
        """Submit all prompts of a request. What has not ended at the end of the block is cancelled.

        Raises InvalidRequest for a request that cannot be answered, and ApiError for one that cannot be admitted now.
        """
        self.check_serving()
        self.check_model(request.model)
        n_answers = len(request.prompts) * request.params.n
        self._check_queue(n_answers)
        self._n_in_work += 1
        requests: list[Request] = []
        try:
            requests = await self._submit(request, n_answers)
            yield requests
        finally:
            self._n_in_work -= 1
            self._submitted.difference_update(requests)
            for one in requests:
                if not one.is_finished:
                    one.cancel()
            await self.computed(self._note, requests, is_large=is_large(request, requests))

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
        await self.in_thread(self.engine.close)

    async def _submit(self, request: ApiRequest, n_answers: int) -> list[Request]:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._threads, submit, self.engine, request, self.settings.max_prompt_tokens)
        self._n_submitting += n_answers
        try:
            requests = await asyncio.shield(future)
            self._submitted.update(requests)
            return requests
        except RuntimeError:  # the engine was closed, or has failed, meanwhile
            self.check_serving()
            raise
        except asyncio.CancelledError:  # the client has gone; the thread goes on, and what it submits nobody awaits
            future.add_done_callback(_cancel_all)
            raise
        finally:
            self._n_submitting -= n_answers

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
            times, n_answers = request.partial.times, len(request.sequences)
            if times.first_token is not None and times.end is not None:
                # Those of more answers than there are rows run one after the other.
                seconds = (times.end - times.first_token) / math.ceil(n_answers / self._n_rows)
                self._answer_seconds += (1 - (1 - SMOOTHING) ** n_answers) * (seconds - self._answer_seconds)


def is_large(request: ApiRequest, submitted: Sequence[Request]) -> bool:
    """Whether it takes long to write what has come of a request's answers."""
    n_tokens = sum(len(answer.tokens) for one in submitted for answer in one.partial.answers)
    return n_tokens * (1 + (request.params.logprobs or 0)) > LARGE_TOKENS


def _cancel_all(submitting: "asyncio.Future[list[Request]]") -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        for request in submitting.result():
            request.cancel()
