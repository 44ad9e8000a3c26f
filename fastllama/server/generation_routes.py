"""The routes that generate: completions, chats and responses."""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from fastllama.engine.any_engine import EngineFailed
from fastllama.engine.request import Numbered, merged
from fastllama.engine.request import Request as EngineRequest
from fastllama.openai_api.chunks import Chunk, StreamWriter
from fastllama.openai_api.errors import AnswerFailed
from fastllama.server import documents
from fastllama.server.bodies import SMALL_BYTES, read_json
from fastllama.server.errors import CLIENT_GONE, ENGINE_FAILED, INTERNAL_ERROR, ApiError, error_body
from fastllama.server.exchange import Exchange, chat_exchange, completion_exchange, may_have_grammar, responses_exchange
from fastllama.server.json_response import JsonResponse
from fastllama.server.service import Service, are_many, is_large
from fastllama.server.streaming import ClientGone, EventStream, unless_gone

Submitting = AbstractAsyncContextManager[list[EngineRequest]]
logger = logging.getLogger(__name__)


def generation_routes(service: Service) -> APIRouter:
    """The routes, on a service."""
    router = APIRouter()

    @router.post("/v1/completions", **documents.COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await _answer(service, request, completion_exchange)

    @router.post("/v1/chat/completions", **documents.CHAT_COMPLETIONS)
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, chat_exchange)

    @router.post("/v1/responses", **documents.RESPONSES)
    async def responses(request: Request) -> Response:
        return await _answer(service, request, responses_exchange)

    return router


async def _answer(service: Service, http: Request, new_exchange: Callable[..., Exchange]) -> Response:
    service.check_serving()
    body, formatter = await read_json(http, service), service.engine.facts.formatter
    is_quick = body.n_bytes <= SMALL_BYTES and not may_have_grammar(body.value)
    exchange = await service.prepared(new_exchange, body.value, service.served, formatter, is_quick=is_quick)
    submitted = service.submitted(exchange.request, is_quick=is_quick)
    if exchange.request.stream:
        return EventStream(_events(service, exchange, submitted))
    try:
        return await unless_gone(http.receive, _whole(service, exchange, submitted))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)


async def _whole(service: Service, exchange: Exchange, submitting: Submitting) -> Response:
    async with submitting as submitted:
        results = [await one.aresult() for one in submitted]
        if any(answer.finish_reason == "cancelled" for result in results for answer in result.answers):
            raise _stopped()

        def write() -> Response:
            return JsonResponse(exchange.whole(results))

        return await service.computed(write, is_large=is_large(exchange.request, submitted))


async def _events(service: Service, exchange: Exchange, submitting: Submitting) -> AsyncIterator[bytes]:
    """The stream's pieces. An exception before the first one is raised; a later one becomes an event."""
    async with submitting as submitted:
        writer, has_begun = exchange.new_writer(submitted), False

        async def finish(write: Callable[..., list[Chunk]], *arguments: Any) -> bytes:
            work = partial(_encoded, exchange, write, *arguments)
            return await service.computed(work, is_large=is_large(exchange.request, submitted)) + exchange.done

        try:
            async for increments in merged(submitted):
                n_tokens = sum(len(one.increment.tokens) for one in increments)
                work = partial(_piece, exchange, writer, increments, is_first=not has_begun)
                piece, failure = await service.computed(work, is_large=are_many(exchange.request, n_tokens))
                if piece or failure is None:
                    has_begun = True
                    yield piece
                if failure is not None:
                    raise failure
            yield await finish(writer.end)
        except Exception as error:
            if not has_begun:
                raise
            yield await finish(writer.fail, _failure(error))


def _piece(
    exchange: Exchange, writer: StreamWriter, increments: Sequence[Numbered], *, is_first: bool
) -> tuple[bytes, Exception | None]:
    """What increments give, and the exception that one of them raises: what those before it gave is not lost."""
    begin = writer.begin() if is_first else []
    chunks: list[Chunk] = []
    failure: Exception | None = None
    try:
        for number, increment in increments:
            if increment.finish_reason == "cancelled":
                raise _stopped()
            chunks += writer.add(number, increment)
    except Exception as error:
        if not chunks:
            return b"", error
        failure = error
    return _encoded(exchange, lambda: begin + chunks), failure


def _encoded(exchange: Exchange, write: Callable[..., list[Chunk]], *arguments: Any) -> bytes:
    return b"".join(map(exchange.encode, write(*arguments)))


def _stopped() -> ApiError:
    """What an answer that was cancelled ends with: only the server's end does that here."""
    return ApiError(503, "the server has stopped before the answer was complete", code="stopping", Retry_After="5")


def _failure(error: Exception) -> dict[str, Any]:
    match error:
        case ApiError():
            return error_body(error.status, str(error), error.code)
        case AnswerFailed():
            return error_body(500, str(error), "answer_failed")
        case EngineFailed():
            return error_body(503, ENGINE_FAILED, "engine_failed")
    logger.error("a stream failed", exc_info=error)
    return error_body(500, INTERNAL_ERROR, "internal_error")
