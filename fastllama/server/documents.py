"""What /openapi.json says of each route: bodies, answers and errors.

The rules between fields, such as that top_logprobs needs logprobs, are not in it. They are in `openai_api/requests.py`.
"""

from typing import Any

from fastllama.engine.sampling_params import MAX_BIAS, MAX_PENALTY, MAX_STOP_STRINGS, MOST_TOKENS
from fastllama.kernels.sampling.controls import MAX_TOP_TOKENS
from fastllama.openai_api import known_fields
from fastllama.openai_api.requests import MAX_ANSWERS
from fastllama.openai_api.tools import MODES, NAME
from fastllama.validate import LEAST_SEED, MOST_SEED

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": ["boolean", "null"]}
STOP_TEXT: Schema = {"type": "string", "minLength": 1}
TOKEN: Schema = {"type": "integer", "minimum": 0}
ERRORS = {
    400: "The request cannot be answered as it is.",
    401: "The API key is missing or wrong.",
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
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _number(least: float, most: float) -> Schema:
    return {"type": ["number", "null"], "minimum": least, "maximum": most}


def _whole(least: int, most: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": least, "maximum": most}


def _list(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": properties}


SAMPLING: dict[str, Schema] = {
    "model": {"type": ["string", "null"]},
    "max_tokens": _whole(0, MOST_TOKENS),
    "temperature": {"type": ["number", "null"], "minimum": 0},
    "top_p": _number(0, 1),
    "top_k": _whole(-1, MOST_TOKENS),
    "min_p": _number(0, 1),
    "n": _whole(1, MAX_ANSWERS),
    # JSON readers may take large bounds as floats: this one is exact.
    "seed": {"type": ["integer", "null"], "minimum": LEAST_SEED, "exclusiveMaximum": MOST_SEED + 1},
    "stop": {"anyOf": [STOP_TEXT, {**_list(STOP_TEXT), "maxItems": MAX_STOP_STRINGS}, {"type": "null"}]},
    "presence_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "repetition_penalty": _number(1e-3, 1e3),
    "logit_bias": {
        "type": ["object", "null"],
        "patternProperties": {"^[0-9]+$": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS}},
        "additionalProperties": False,
    },
    "stream": FLAG,
    "stream_options": {
        "type": ["object", "null"],
        "properties": {"include_usage": FLAG, "continuous_usage_stats": FLAG},
    },
    "ignore_eos": FLAG,
    "return_token_ids": FLAG,
    "min_tokens": _whole(0, MOST_TOKENS),
    "stop_token_ids": {"anyOf": [_list(TOKEN), {"type": "null"}]},
}


def _unsupported(fields: known_fields.BodyFields) -> dict[str, Schema]:
    """The fields that are refused, unless their value asks for nothing."""
    return {name: {"enum": [None, *values]} for name, values in fields.refused.items()}


CONTENT: Schema = {"anyOf": [TEXT, _list(_object(["type", "text"], type={"const": "text"}, text=TEXT))]}
MESSAGE: Schema = {
    "anyOf": [
        _object(["role", "content"], role={"enum": ["system", "developer", "user", "assistant"]}, content=CONTENT),
        _object(["role", "tool_calls"], role={"const": "assistant"}, tool_calls=_list({"type": "object"}, 1)),
        _object(["role", "content", "tool_call_id"], role={"const": "tool"}, content=CONTENT, tool_call_id=TEXT),
    ]
}
FUNCTION = _object(
    ["name"],
    name={"type": "string", "pattern": f"^{NAME.pattern}$"},
    description=TEXT,
    parameters={"type": "object", "properties": {"type": {"const": "object"}}},
    strict=FLAG,
)
TOOL = _object(["type", "function"], type={"const": "function"}, function=FUNCTION)
JSON_SCHEMA = _object(
    ["type", "json_schema"],
    type={"const": "json_schema"},
    json_schema=_object(["name"], name=TEXT, description=TEXT, schema={"type": "object"}, strict=FLAG),
)
COMPLETION_BODY = _object(
    ["prompt"],
    **_unsupported(known_fields.COMPLETIONS),
    **SAMPLING,
    prompt={"anyOf": [TEXT, _list(TOKEN, 1), _list(TEXT, 1), _list(_list(TOKEN, 1), 1)]},
    echo=FLAG,
    logprobs=_whole(0, MAX_TOP_TOKENS),
)
CHAT_BODY = _object(
    ["messages"],
    **_unsupported(known_fields.CHATS),
    **SAMPLING,
    messages=_list(MESSAGE, 1),
    max_completion_tokens=_whole(0, MOST_TOKENS),
    tools={"anyOf": [_list(TOOL), {"type": "null"}]},
    tool_choice={"anyOf": [{"enum": [*MODES, None]}, {"type": "object"}]},
    parallel_tool_calls=FLAG,
    response_format={
        "anyOf": [_object(["type"], type={"enum": ["text", "json_object"]}), JSON_SCHEMA, {"type": "null"}]
    },
    logprobs=FLAG,
    top_logprobs=_whole(0, MAX_TOP_TOKENS),
)
RESPONSES_BODY = _object(
    ["input"],
    model={"type": ["string", "null"]},
    input={"anyOf": [TEXT, _list({"type": "object"}, 1)]},
    instructions={"type": ["string", "null"]},
    max_output_tokens=_whole(0, MOST_TOKENS),
    temperature={"type": ["number", "null"], "minimum": 0},
    top_p=_number(0, 1),
    stream=FLAG,
    tools={"anyOf": [_list({"type": "object"}), {"type": "null"}]},
    tool_choice={"anyOf": [{"enum": [*MODES, None]}, {"type": "object"}]},
    parallel_tool_calls=FLAG,
    text={"type": ["object", "null"]},
)
RESPONSE_OBJECT = _object(
    ["id", "object", "status", "output"],
    id=TEXT,
    object={"const": "response"},
    status={"enum": ["completed", "incomplete"]},
    output=_list({"type": "object"}),
)
USAGE = _object(
    ["prompt_tokens", "completion_tokens", "total_tokens"],
    prompt_tokens=TOKEN,
    completion_tokens=TOKEN,
    total_tokens=TOKEN,
)
ANSWER = _object(
    ["id", "object", "created", "model", "choices", "usage"],
    id=TEXT,
    object=TEXT,
    created=TOKEN,
    model=TEXT,
    choices=_list({"type": "object"}, 1),
    usage=USAGE,
)
MODEL_OBJECT = _object(["id", "object"], id=TEXT, object={"const": "model"}, max_model_len=TOKEN)
TOKENS_OBJECT = _object(["count", "max_model_len", "tokens"], count=TOKEN, max_model_len=TOKEN, tokens=_list(TOKEN))


def _content(schema: Schema, kind: str = "application/json") -> dict[str, Any]:
    return {kind: {"schema": schema}}


def _route(summary: str, answer: dict[str, Any], body: Schema | None = None, errors: tuple[int, ...] = ()) -> Any:
    """The arguments of a route. answer: the content of 200. Every route may also refuse a key and be too busy."""
    statuses = sorted({401, 429, *errors, *((400, 404, 408, 413, 415) if body is not None else ())})
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
MODELS = _route("The model of this server", _content(_object(["data"], data=_list(MODEL_OBJECT, 1))))
MODEL = _route("One model", _content(MODEL_OBJECT), errors=(404,))
MODEL["openapi_extra"] = {"parameters": [{"name": "name", "in": "path", "required": True, "schema": TEXT}]}
TOKENIZE = _route(
    "The tokens of a text, or of a conversation",
    _content(TOKENS_OBJECT),
    {"anyOf": [_object(["prompt"], prompt=TEXT), _object(["messages"], messages=_list(MESSAGE, 1))]},
)
DETOKENIZE = _route(
    "The text of tokens", _content(_object(["prompt"], prompt=TEXT)), _object(["tokens"], tokens=_list(TOKEN))
)
HEALTH = _route("Whether the server takes requests", _content(_object(["status"], status=TEXT)), errors=(503,))
METRICS = _route("Counters for Prometheus", _content(TEXT, "text/plain"))
