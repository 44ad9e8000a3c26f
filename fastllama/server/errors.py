"""Errors over HTTP: every one has OpenAI's shape and a status that its clients know."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from fastllama.engine.any_engine import EngineFailed
from fastllama.openai_api.errors import AnswerFailed, InvalidRequest
from fastllama.server.json_response import JsonResponse

logger = logging.getLogger(__name__)

BAD_REQUEST, NOT_FOUND, SERVER_ERROR = 400, 404, 500
CLIENT_GONE = 499  # nobody receives it; nginx's logs have it, too
MODEL_NOT_FOUND = "model_not_found"
TYPES = {  # by status
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
ENGINE_FAILED = "the engine has failed, and the server ends"
INTERNAL_ERROR = "the server failed on this request: its log says why"
CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An error that ends a request with this status."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, **headers: str) -> None:
        """headers: names with underscores for hyphens."""
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def error_body(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = TYPES.get(status, "server_error" if status >= SERVER_ERROR else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int, message: str, code: str | None, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JsonResponse:
    """The response of an error."""
    return JsonResponse(error_body(status, message, code, param), status, headers)


def response_of(error: Exception) -> JsonResponse:
    """The response of an exception. One that nobody expected is logged, and keeps its text to itself."""
    match error:
        case ApiError():
            return error_response(error.status, str(error), error.code, error.param, error.headers)
        case InvalidRequest():
            status = NOT_FOUND if error.code == MODEL_NOT_FOUND else BAD_REQUEST
            return error_response(status, str(error), error.code, error.param)
        case AnswerFailed():
            return error_response(SERVER_ERROR, str(error), "answer_failed")
        case EngineFailed():  # its process says why
            return error_response(503, ENGINE_FAILED, "engine_failed")
        case HTTPException():
            code = CODES.get(error.status_code)
            return error_response(error.status_code, str(error.detail), code, headers=error.headers)
        case RequestValidationError():
            first = (error.errors() or [{}])[0]
            where = ".".join(map(str, first.get("loc", ())))
            return error_response(
                BAD_REQUEST, f"{where}: {first.get('msg', 'invalid')}", "invalid_value", where or None
            )
    logger.error("a request failed", exc_info=error)
    return error_response(SERVER_ERROR, INTERNAL_ERROR, "internal_error")


def add_handlers(app: FastAPI) -> None:
    """Give every error of an app OpenAI's shape."""

    async def handle(request: Request, error: Exception) -> JsonResponse:
        return response_of(error)

    for kind in (ApiError, InvalidRequest, AnswerFailed, EngineFailed, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, handle)
