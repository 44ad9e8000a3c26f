"""The routes that generate: completions, chats and responses."""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from fastllama.engine.request import Request as EngineRequest
from fastllama.engine.request import merged
from fastllama.openai_api.errors import AnswerFailed
from fastllama.server import documents
from fastllama.server.bodies import read_json
from fastllama.server.errors import CLIENT_GONE, INTERNAL_ERROR, ApiError, error_body
from fastllama.server.exchange import Exchange, chat_exchange, completion_exchange, responses_exchange
from fastllama.server.json_response import JsonResponse
from fastllama.server.service import Service
from fastllama.server.streaming import ClientGone, EventStream, unless_gone

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
    body, formatter = await read_json(http, service.settings), service.engine.llm.formatter
    exchange = await service.in_thread(new_exchange, body, service.served, formatter)  # a grammar takes time
    if exchange.request.stream:
        return EventStream(_events(service, exchange))
    try:
        return JsonResponse(await unless_gone(http.receive, _whole(service, exchange)))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)


async def _whole(service: Service, exchange: Exchange) -> dict[str, Any]:
    async with service.submitted(exchange.request) as submitted:
        results = [await one.aresult() for one in submitted]
        _check_finished(submitted)
        return exchange.whole(results)


async def _events(service: Service, exchange: Exchange) -> AsyncIterator[bytes]:
    """The stream's pieces. An exception before the first one is raised; a later one becomes an event."""
    encode = exchange.encode
    async with service.submitted(exchange.request) as submitted:
        writer, has_begun = exchange.new_writer(submitted), False
        try:
            async for increments in merged(submitted):
                chunks = [] if has_begun else writer.begin()
                for number, increment in increments:
                    if increment.finish_reason == "cancelled":
                        _check_finished(submitted)
                    chunks += writer.add(number, increment)
                has_begun = True
                yield b"".join(map(encode, chunks))
            yield b"".join(map(encode, writer.end())) + exchange.done
        except Exception as error:
            if not has_begun:
                raise
            yield b"".join(map(encode, writer.fail(_failure(error)))) + exchange.done


def _check_finished(submitted: list[EngineRequest]) -> None:
    """Raise ApiError if an answer was cancelled, which only the server's end does here."""
    if any(answer.finish_reason == "cancelled" for one in submitted for answer in one.partial.answers):
        raise ApiError(503, "the server has stopped before the answer was complete", code="stopping", Retry_After="5")


def _failure(error: Exception) -> dict[str, Any]:
    match error:
        case ApiError():
            return error_body(error.status, str(error), error.code)
        case AnswerFailed():
            return error_body(500, str(error), "answer_failed")
    logger.error("a stream failed", exc_info=error)
    return error_body(500, INTERNAL_ERROR, "internal_error")
