"""How each route answers: what a body asks for, and in which form the answer goes back, whole or as events."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastllama.chat_format import Formatter
from fastllama.engine.request import Request, Result
from fastllama.engine.sequence import Increment
from fastllama.openai_api.chunks import Chunk, StreamWriter, new_writer
from fastllama.openai_api.envelope import ServedModel
from fastllama.openai_api.requests import ApiRequest, chat_request, completion_request
from fastllama.openai_api.responses import response
from fastllama.openai_api.responses_api import ResponsesRequest, responses_request
from fastllama.openai_api.responses_events import ResponseWriter, response_object
from fastllama.server.json_response import json_bytes

GRAMMAR_FIELDS = frozenset({"response_format", "text", "tools"})
DONE = b"data: [DONE]\n\n"


def may_have_grammar(body: object) -> bool:
    """Whether what a body asks for may need a grammar, which takes time."""
    return isinstance(body, dict) and not GRAMMAR_FIELDS.isdisjoint(body)


class Exchange(NamedTuple):
    """A request, and how it is answered."""

    request: ApiRequest
    whole: Callable[[Sequence[Result]], dict[str, Any]]  # the body of the answer
    new_writer: Callable[[Sequence[Request]], StreamWriter]
    encode: Callable[[Chunk], bytes]  # a chunk as a server-sent event
    done: bytes  # the last event


def completion_exchange(body: object, served: ServedModel, formatter: Formatter) -> Exchange:
    """Of /v1/completions. Raises InvalidRequest, as do the other two."""
    return _with_choices(completion_request(body, allow_unknown=True), served)


def chat_exchange(body: object, served: ServedModel, formatter: Formatter) -> Exchange:
    """Of /v1/chat/completions."""
    return _with_choices(chat_request(body, formatter=formatter, allow_unknown=True), served)


def responses_exchange(body: object, served: ServedModel, formatter: Formatter) -> Exchange:
    """Of /v1/responses."""
    found = responses_request(body, formatter=formatter, allow_unknown=True)
    return Exchange(
        request=found.request,
        whole=lambda results: response_object(found, results[0], served.tokenizer, served.name),
        new_writer=lambda submitted: _ResponseEvents(found, submitted[0], served),
        encode=lambda event: b"event: " + event["type"].encode() + b"\n" + _data(event),
        done=b"",
    )


class _ResponseEvents:
    """The stream of /v1/responses."""

    def __init__(self, request: ResponsesRequest, submitted: Request, served: ServedModel) -> None:
        self._submitted = submitted
        self._writer = ResponseWriter(request, served.tokenizer, served.name)

    def begin(self) -> list[Chunk]:
        """The response, without an answer."""
        return self._writer.begin()

    def add(self, number: int, increment: Increment) -> list[Chunk]:
        """The events of an increment."""
        return self._writer.add(increment)

    def end(self) -> list[Chunk]:
        """The response, complete or failed."""
        return self._writer.end(self._submitted.partial)

    def fail(self, error: Chunk) -> list[Chunk]:
        """The response, failed."""
        return self._writer.fail(error["error"]["message"], self._submitted.partial)


def _with_choices(request: ApiRequest, served: ServedModel) -> Exchange:
    return Exchange(
        request=request,
        whole=lambda results: response(request, results, served),
        new_writer=lambda submitted: new_writer(request, submitted, served),
        encode=_data,
        done=DONE,
    )


def _data(chunk: Chunk) -> bytes:
    return b"data: " + json_bytes(chunk) + b"\n\n"
