"""Reads the body of a request: at most so many bytes, in time, valid JSON."""

import asyncio
import functools
from typing import Any, NamedTuple

from fastapi import Request
from starlette.requests import ClientDisconnect

from fastllama import strict_json
from fastllama.openai_api.errors import InvalidRequest
from fastllama.server.errors import CLIENT_GONE, ApiError
from fastllama.server.service import Service
from fastllama.server.settings import MEBIBYTE

JSON_TYPES = ("application/json", "+json")
LARGE_BYTES = 2**16  # of a body that is parsed in a thread
SMALL_BYTES = 2**12  # of a body whose prompt is encoded sooner than a thread is woken


class Body(NamedTuple):
    """A body that was read."""

    value: Any
    n_bytes: int


async def read_json(request: Request, service: Service) -> Body:
    """The body. Raises ApiError for a body that is too large, slow or of another type, InvalidRequest for one
    that is not JSON.
    """
    settings = service.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not kind.endswith(JSON_TYPES):
        raise ApiError(
            415,
            f"the header Content-Type must be application/json, got {kind[:100]!r}",
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(settings.body_seconds):
            data = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time: send it again", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(
            CLIENT_GONE, "the client went away before the whole body was there", code="client_gone"
        ) from None
    try:
        # What is not finite or nested more deeply could not be repeated in an answer or in an error.
        loads = functools.partial(strict_json.loads, data, allow_nan=False, max_depth=strict_json.MAX_DEPTH)
        return Body(await service.computed(loads, is_large=len(data) > LARGE_BYTES), len(data))
    except RecursionError:
        wrong = (
            f"the body is nested too deeply: it may have {strict_json.MAX_DEPTH} lists and objects within each other"
        )
        raise InvalidRequest(wrong, code="invalid_json") from None
    except ValueError as error:  # also of a wrong encoding
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None


async def _read(request: Request, most: int) -> bytes:
    announced = request.headers.get("content-length", "")
    too_large = announced.isdecimal() and float(announced) > most
    pieces: list[bytes] = []
    size = 0
    if not too_large:
        async for piece in request.stream():
            pieces.append(piece)
            size += len(piece)
            if too_large := size > most:
                break
    if too_large:
        raise ApiError(
            413,
            f"the body has {announced or f'more than {most}'} bytes, and at most {most} are read "
            f"(--max_body_mib {most / MEBIBYTE:g})",
            code="body_too_large",
            Connection="close",
        )
    return b"".join(pieces)
