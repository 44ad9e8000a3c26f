"""JSON schemas of the bodies that the routes take, for /openapi.json.

The rules between fields, such as that top_logprobs needs logprobs, are not in them: `openai_api/requests.py` has them.
"""

from typing import Any

from fastllama.engine.sampling_params import MAX_BIAS, MAX_PENALTY, MAX_STOP_STRINGS, MOST_TOKENS
from fastllama.kernels.sampling.controls import MAX_TOP_TOKENS
from fastllama.openai_api.known_fields import (
    CHATS,
    COMPLETIONS,
    RESPONSES,
    UNSUPPORTED_STREAM_OPTIONS,
    NeutralValues,
)
from fastllama.openai_api.messages import UNSUPPORTED_MEMBERS
from fastllama.openai_api.requests import MAX_ANSWERS
from fastllama.openai_api.responses_api import INCLUDABLE, UNSUPPORTED_REASONING, UNSUPPORTED_TEXT
from fastllama.openai_api.tools import ALLOWED, MAX_TOOLS, MODES, NAME
from fastllama.validate import LEAST_SEED, MOST_SEED

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
OPTIONAL_TEXT: Schema = {"type": ["string", "null"]}
FLAG: Schema = {"type": ["boolean", "null"]}
STOP_TEXT: Schema = {"type": "string", "minLength": 1}
TOKEN: Schema = {"type": "integer", "minimum": 0}


def _number(least: float, most: float) -> Schema:
    return {"type": ["number", "null"], "minimum": least, "maximum": most}


def _whole(least: int, most: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": least, "maximum": most}


def list_of(items: Schema, least: int = 0) -> Schema:
    """A list of at least so many items."""
    return {"type": "array", "items": items, "minItems": least}


def object_of(required: list[str], **properties: Schema) -> Schema:
    """An object with these properties, and others."""
    return {"type": "object", "required": required, "properties": properties}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _refused(neutral: NeutralValues) -> dict[str, Schema]:
    """The members that are refused, unless their value asks for nothing."""
    return {name: {"enum": [None, *values]} for name, values in neutral.items()}


SAMPLING: dict[str, Schema] = {
    "model": OPTIONAL_TEXT,
    "temperature": {"type": ["number", "null"], "minimum": 0},
    "top_p": _number(0, 1),
    "top_k": _whole(-1, MOST_TOKENS),
    "min_p": _number(0, 1),
    # JSON readers may take large bounds as floats: this one is exact.
    "seed": {"type": ["integer", "null"], "minimum": LEAST_SEED, "exclusiveMaximum": MOST_SEED + 1},
    "stop": {"anyOf": [TEXT, {**list_of(STOP_TEXT), "maxItems": MAX_STOP_STRINGS}, {"type": "null"}]},
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
        "properties": {"include_usage": FLAG, "continuous_usage_stats": FLAG, **_refused(UNSUPPORTED_STREAM_OPTIONS)},
    },
    "ignore_eos": FLAG,
    "min_tokens": _whole(0, MOST_TOKENS),
    "stop_token_ids": _or_null(list_of(TOKEN)),
}
WITH_CHOICES: dict[str, Schema] = {  # of the APIs whose answers have choices
    **SAMPLING,
    "max_tokens": _whole(0, MOST_TOKENS),
    "n": _whole(1, MAX_ANSWERS),
    "return_token_ids": FLAG,
}


def _content(*kinds: str) -> Schema:
    return {"anyOf": [TEXT, list_of(object_of(["type", "text"], type={"enum": list(kinds)}, text=TEXT))]}


FUNCTION_NAME: Schema = {"type": "string", "pattern": f"^{NAME.pattern}$"}
CALLED = object_of(["name", "arguments"], name=TEXT, arguments=TEXT)  # the text of a JSON object
CALL = object_of(["id", "function"], id=TEXT, type={"const": "function"}, function=CALLED)


def _message(roles: list[str], required: list[str], **own: Schema) -> Schema:
    """A message of these roles. own: its members beside its role and name."""
    names = (*UNSUPPORTED_MEMBERS, "tool_calls", "tool_call_id")
    refused: dict[str, Schema] = {name: {"enum": [None, []]} for name in names}
    members = {"role": {"enum": roles}, "name": OPTIONAL_TEXT, **refused, **own}
    return object_of(["role", *required], **members)


MESSAGE: Schema = {
    "anyOf": [
        _message(["system", "developer", "user"], ["content"], content=_content("text")),
        _message(["assistant"], ["content"], content=_content("text"), tool_calls=_or_null(list_of(CALL))),
        _message(["assistant"], ["tool_calls"], content=_or_null(_content("text")), tool_calls=list_of(CALL, 1)),
        _message(["tool"], ["content", "tool_call_id"], content=_content("text"), tool_call_id=TEXT),
    ]
}
INPUT_ITEM: Schema = {
    "anyOf": [
        object_of(
            ["role", "content"],
            type={"const": "message"},
            role={"enum": ["system", "developer", "user"]},
            content=_content("input_text"),
        ),
        object_of(
            ["role", "content"],
            type={"const": "message"},
            role={"const": "assistant"},
            content=_content("output_text", "input_text"),
        ),
        object_of(
            ["type", "call_id", "name", "arguments"],
            type={"const": "function_call"},
            call_id=TEXT,
            name=TEXT,
            arguments=TEXT,
        ),
        object_of(
            ["type", "call_id", "output"],
            type={"const": "function_call_output"},
            call_id=TEXT,
            output=_content("input_text"),
        ),
    ]
}
FUNCTION: dict[str, Schema] = {
    "name": FUNCTION_NAME,
    "description": OPTIONAL_TEXT,
    "parameters": _or_null({"type": "object", "properties": {"type": {"const": "object"}}}),
    "strict": FLAG,
}
SCHEMA: dict[str, Schema] = {
    "name": TEXT,
    "description": OPTIONAL_TEXT,
    "schema": {"type": ["object", "null"]},
    "strict": FLAG,
}
PLAIN_FORMAT = object_of(["type"], type={"enum": ["text", "json_object"]})
IS_FUNCTION: Schema = {"const": "function"}
NAMED = object_of(["name"], name=FUNCTION_NAME)
MODE: Schema = {"enum": list(MODES[1:])}


def _tools(tool: Schema) -> Schema:
    return _or_null({**list_of(tool), "maxItems": MAX_TOOLS})


def _tool_choice(*objects: Schema) -> Schema:
    return {"anyOf": [{"enum": [*MODES, None]}, *objects]}


NAMED_FUNCTION = object_of(["type", "function"], type=IS_FUNCTION, function=NAMED)
FLAT_NAMED_FUNCTION = object_of(["type", "name"], type=IS_FUNCTION, name=FUNCTION_NAME)
COMPLETION_BODY = object_of(
    ["prompt"],
    **_refused(COMPLETIONS.refused),
    **WITH_CHOICES,
    prompt={"anyOf": [TEXT, list_of(TOKEN, 1), list_of(TEXT, 1), list_of(list_of(TOKEN, 1), 1)]},
    echo=FLAG,
    logprobs=_whole(0, MAX_TOP_TOKENS),
)
CHAT_BODY = object_of(
    ["messages"],
    **_refused(CHATS.refused),
    **WITH_CHOICES,
    messages=list_of(MESSAGE, 1),
    max_completion_tokens=_whole(0, MOST_TOKENS),
    tools=_tools(object_of(["type", "function"], type=IS_FUNCTION, function=object_of(["name"], **FUNCTION))),
    tool_choice=_tool_choice(
        NAMED_FUNCTION,
        object_of(
            ["type", ALLOWED],
            type={"const": ALLOWED},
            allowed_tools=object_of(["mode", "tools"], mode=MODE, tools=list_of(NAMED_FUNCTION, 1)),
        ),
    ),
    parallel_tool_calls=FLAG,
    response_format={
        "anyOf": [
            PLAIN_FORMAT,
            object_of(
                ["type", "json_schema"], type={"const": "json_schema"}, json_schema=object_of(["name"], **SCHEMA)
            ),
            {"type": "null"},
        ]
    },
    logprobs=FLAG,
    top_logprobs=_whole(0, MAX_TOP_TOKENS),
)
RESPONSES_BODY = object_of(
    ["input"],
    **_refused(RESPONSES.refused),
    **SAMPLING,
    input={"anyOf": [TEXT, list_of(INPUT_ITEM, 1)]},
    instructions=OPTIONAL_TEXT,
    max_output_tokens=_whole(0, MOST_TOKENS),
    top_logprobs=_whole(0, MAX_TOP_TOKENS),
    include=_or_null(list_of({"enum": list(INCLUDABLE)})),
    reasoning=_or_null(object_of([], **_refused(UNSUPPORTED_REASONING))),
    text=_or_null(
        object_of(
            [],
            format={
                "anyOf": [
                    PLAIN_FORMAT,
                    object_of(["type", "name"], type={"const": "json_schema"}, **SCHEMA),
                    {"type": "null"},
                ]
            },
            **_refused(UNSUPPORTED_TEXT),
        )
    ),
    tools=_tools(object_of(["type", "name"], type=IS_FUNCTION, **FUNCTION)),
    tool_choice=_tool_choice(
        FLAT_NAMED_FUNCTION,
        object_of(["type", "mode", "tools"], type={"const": ALLOWED}, mode=MODE, tools=list_of(FLAT_NAMED_FUNCTION, 1)),
    ),
    parallel_tool_calls=FLAG,
    metadata={"type": ["object", "null"], "additionalProperties": TEXT},
    user=OPTIONAL_TEXT,
    safety_identifier=OPTIONAL_TEXT,
    prompt_cache_key=OPTIONAL_TEXT,
)
TOKENIZE_BODY: Schema = {
    "anyOf": [
        object_of(["prompt"], prompt=TEXT, model=OPTIONAL_TEXT, add_special_tokens=FLAG, return_token_strs=FLAG),
        object_of(["messages"], **CHAT_BODY["properties"], return_token_strs=FLAG),
    ]
}
DETOKENIZE_BODY = object_of(["tokens"], tokens=list_of(TOKEN), model=OPTIONAL_TEXT)
