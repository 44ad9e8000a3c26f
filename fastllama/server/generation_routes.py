"""The routes that generate: completions, chats and responses."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from fastllama.engine.merged import merged
from fastllama.engine.request import Request as EngineRequest
from fastllama.openai_api.chunks import new_writer
from fastllama.openai_api.errors import AnswerFailed
from fastllama.openai_api.requests import ApiRequest, chat_request, completion_request
from fastllama.openai_api.responses import response
from fastllama.server import documents
from fastllama.server.bodies import read_json
from fastllama.server.errors import CLIENT_GONE, ApiError, error_body
from fastllama.server.json_response import JsonResponse, json_bytes
from fastllama.server.service import Service
from fastllama.server.streaming import ClientGone, EventStream, unless_gone

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def generation_routes(service: Service) -> APIRouter:
    """The routes, on a service."""
    router = APIRouter()

    @router.post("/v1/completions", **documents.COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await _answer(service, request, completion_request)

    @router.post("/v1/chat/completions", **documents.CHAT_COMPLETIONS)
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, partial(chat_request, formatter=service.engine.llm.formatter))

    return router


async def _answer(service: Service, http: Request, parse: Callable[..., ApiRequest]) -> Response:
    service.check_serving()
    body = await read_json(http, service.settings)
    request = await service.in_thread(partial(parse, body, allow_unknown=True))  # a grammar takes time
    if request.stream:
        return EventStream(_events(service, request))
    try:
        return JsonResponse(await unless_gone(http.receive, _whole(service, request)))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)


async def _whole(service: Service, request: ApiRequest) -> dict[str, Any]:
    async with service.submitted(request) as submitted:
        results = [await one.aresult() for one in submitted]
        _check_finished(submitted)
        return response(request, results, service.served)


async def _events(service: Service, request: ApiRequest) -> AsyncIterator[bytes]:
    """The stream's pieces. An exception before the first one is raised; a later one becomes an event."""
    async with AsyncExitStack() as stack:
        submitted = await stack.enter_async_context(service.submitted(request))
        writer = new_writer(request, submitted, service.served)
        has_begun = False
        try:
            async for increments in merged(submitted):
                chunks = [] if has_begun else writer.begin()
                for number, increment in increments:
                    if increment.finish_reason == "cancelled":
                        _check_finished(submitted)
                    chunks += writer.add(number, increment)
                has_begun = True
                yield b"".join(map(_event, chunks))
            yield b"".join(map(_event, writer.end())) + DONE
        except Exception as error:
            if not has_begun:
                raise
            yield _event(_failure(error)) + DONE


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
    return error_body(500, "the server failed on this request: its log says why", "internal_error")


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(chunk) + b"\n\n"
