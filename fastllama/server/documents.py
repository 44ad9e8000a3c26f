"""What /openapi.json says of each route: bodies, answers and errors."""

from typing import Any

from fastllama.server.schemas import (
    CHAT_BODY,
    COMPLETION_BODY,
    DETOKENIZE_BODY,
    OPTIONAL_TEXT,
    RESPONSES_BODY,
    TEXT,
    TOKEN,
    TOKENIZE_BODY,
    Schema,
    list_of,
    object_of,
)

ERRORS = {
    400: "The request cannot be answered as it is.",
    401: "The API key is missing or wrong.",
    403: "The server has no key, and Host is not this machine's own name.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests: try again after Retry-After seconds.",
    500: "The answer failed.",
    503: "The server is stopping.",
}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": TEXT,
                "type": TEXT,
                "param": OPTIONAL_TEXT,
                "code": OPTIONAL_TEXT,
            },
        }
    },
}


RESPONSE_OBJECT = object_of(
    ["id", "object", "status", "output"],
    id=TEXT,
    object={"const": "response"},
    status={"enum": ["completed", "incomplete"]},
    output=list_of({"type": "object"}),
)
USAGE = object_of(
    ["prompt_tokens", "completion_tokens", "total_tokens"],
    prompt_tokens=TOKEN,
    completion_tokens=TOKEN,
    total_tokens=TOKEN,
)
ANSWER = object_of(
    ["id", "object", "created", "model", "choices", "usage"],
    id=TEXT,
    object=TEXT,
    created=TOKEN,
    model=TEXT,
    choices=list_of({"type": "object"}, 1),
    usage=USAGE,
)
MODEL_OBJECT = object_of(["id", "object"], id=TEXT, object={"const": "model"}, max_model_len=TOKEN)
TOKENS_OBJECT = object_of(["count", "max_model_len", "tokens"], count=TOKEN, max_model_len=TOKEN, tokens=list_of(TOKEN))


def _content(schema: Schema, kind: str = "application/json") -> dict[str, Any]:
    return {kind: {"schema": schema}}


def _route(
    summary: str,
    answer: dict[str, Any],
    body: Schema | None = None,
    errors: tuple[int, ...] = (),
    *,
    is_open: bool = False,
) -> Any:
    """The arguments of a route. answer: the content of 200. Unless it is open, it may refuse a key and be too busy."""
    guards = (403,) if is_open else (401, 403, 429)
    statuses = sorted({*guards, *errors, *((400, 404, 408, 413, 415) if body is not None else ())})
    responses: dict[int, Any] = {200: {"description": "The answer.", "content": answer}}
    responses |= {one: {"description": ERRORS[one], "content": _content(ERROR)} for one in statuses}
    extra = {} if body is None else {"requestBody": {"required": True, "content": _content(body)}}
    return {"summary": summary, "responses": responses, "openapi_extra": extra, "response_model": None}


def _generating(summary: str, body: Schema, answer: Schema) -> Any:
    either = _content(answer) | _content({}, "text/event-stream")
    return _route(summary, either, body, (500, 503))


COMPLETIONS = _generating("Continue texts", COMPLETION_BODY, ANSWER)
CHAT_COMPLETIONS = _generating("Answer a conversation", CHAT_BODY, ANSWER)
RESPONSES = _generating("Answer a conversation, as items", RESPONSES_BODY, RESPONSE_OBJECT)
MODELS = _route("The model of this server", _content(object_of(["data"], data=list_of(MODEL_OBJECT, 1))))
MODEL = _route("One model", _content(MODEL_OBJECT), errors=(404,))
MODEL["openapi_extra"] = {"parameters": [{"name": "name", "in": "path", "required": True, "schema": TEXT}]}
TOKENIZE = _route(
    "The tokens of a text, or of a conversation",
    _content(TOKENS_OBJECT),
    TOKENIZE_BODY,
)
DETOKENIZE = _route("The text of tokens", _content(object_of(["prompt"], prompt=TEXT)), DETOKENIZE_BODY)
HEALTH = _route(
    "Whether the server takes requests", _content(object_of(["status"], status=TEXT)), errors=(503,), is_open=True
)
METRICS = _route("Counters for Prometheus", _content(TEXT, "text/plain"))
