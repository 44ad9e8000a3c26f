"""The field response_format of a chat's body → the JSON schema that the answer follows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastllama.engine.grammar import ANY_OBJECT, Grammar
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import flag, members, required, text

TYPES = ("text", "json_object", "json_schema")
SCHEMA_MEMBERS = ("name", "schema", "strict", "description")


class AnswerSchema(NamedTuple):
    """A JSON schema of answers, and its grammar."""

    schema: Mapping[str, Any]
    grammar: Grammar


def answer_schema(value: Any, *, allow_unknown: bool, name: str = "response_format") -> AnswerSchema | None:
    """What a response_format asks for; None for text. name: of the field. Raises InvalidRequest, which names a member.

    In OpenAI's /v1/responses the members of json_schema stand beside the type: pass `name="text.format"`.
    """
    if value is None:
        return None
    is_flat = name != "response_format"
    more = SCHEMA_MEMBERS if is_flat else ("json_schema",)
    found = members(value, name, ("type", *more), allow_unknown=allow_unknown)
    kind = required(found, "type", f"{name}.")
    if kind not in TYPES:
        wrong = f"{name}.type must be one of {', '.join(TYPES)}, got {kind!r:.60}"
        raise InvalidRequest(wrong, param=f"{name}.type")
    if kind != "json_schema":
        return _checked(ANY_OBJECT, name) if kind == "json_object" else None
    if not is_flat:
        inner = required(found, "json_schema", f"{name}.")
        name = f"{name}.json_schema"
        found = members(inner, name, SCHEMA_MEMBERS, allow_unknown=allow_unknown)
    required(found, "name", f"{name}.")
    text(found, "name", f"{name}.")
    text(found, "description", f"{name}.")
    flag(found, "strict", within=f"{name}.")
    schema = found.get("schema", ANY_OBJECT)
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{name}.schema must be an object, got {schema!r:.60}", param=f"{name}.schema")
    return _checked(schema, f"{name}.schema")


def _checked(schema: Mapping[str, Any], name: str) -> AnswerSchema:
    try:
        return AnswerSchema(schema, Grammar.json_schema(schema))
    except RecursionError:
        raise InvalidRequest(f"{name} is nested too deeply", param=name) from None
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from None
