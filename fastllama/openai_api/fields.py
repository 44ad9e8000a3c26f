"""Reads the fields of a body, and the members of objects in it: those that are known, and of the right kind."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.known_fields import NOTHING, BodyFields, NeutralValues

UNSUPPORTED_CODE = "unsupported_parameter"
MAX_NAME_CHARS = 200
NO_HINTS: Mapping[str, str] = {}


def honoured_fields(body: object, kind: BodyFields, *, allow_unknown: bool) -> dict[str, Any]:
    """The fields of a body that are honoured; null means that a field is not given.

    Raises InvalidRequest, which names the field, for one that is not supported, and for an unknown one unless those
    are allowed.
    """
    n = body.get("n") if isinstance(body, dict) else None
    return members(
        body,
        "",
        kind.honoured,
        allow_unknown=allow_unknown,
        unsupported={**kind.refused, "best_of": (1 if n is None else n,)},  # to choose from as many as are asked for
        without_effect=kind.without_effect,
        instead=kind.instead,
    )


def members(
    value: object,
    name: str,
    known: Collection[str],
    *,
    allow_unknown: bool,
    unsupported: NeutralValues = NOTHING,
    without_effect: Collection[str] = (),
    instead: Mapping[str, str] = NO_HINTS,
) -> dict[str, Any]:
    """The members of an object that are honoured, as `honoured_fields`. name: of the object in the body, "" of that.

    instead: what errors name in place of an unsupported member.
    """
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name or 'the body'} must be an object, got {value!r:.60}", param=name or None)
    found: dict[str, Any] = {}
    for member, one in value.items():
        full = f"{name}.{member}" if name else member
        if member in known:
            if one is not None:
                found[member] = one
        elif member in unsupported:
            if one is not None and not any(_is_same(one, neutral) for neutral in unsupported[member]):
                hint = f"use {instead[member]} instead" if member in instead else "leave it out"
                raise InvalidRequest(f"{full} is not supported: {hint}", param=full, code=UNSUPPORTED_CODE)
        elif member not in without_effect and not allow_unknown:
            close = difflib.get_close_matches(member, sorted(known), 1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            where = name or "this request"
            text = f"{member[:60]!r} is not a field of {where}: {hint}"
            raise InvalidRequest(text, param=full[:MAX_NAME_CHARS], code="unknown_parameter")
    return found


def flag(fields: Mapping[str, Any], field: str, *, default: bool = False, within: str = "") -> bool:
    """A field that is true or false. within: what the error puts before the field's name."""
    value = fields.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        name = within + field
        raise InvalidRequest(f"{name} must be true or false, got {value!r:.60}", param=name)
    return value


def required(fields: Mapping[str, Any], field: str, within: str = "") -> Any:
    """A field that a body, or the object `within` it, must have."""
    if fields.get(field) is None:
        where = within.removesuffix(".") or "the body"
        raise InvalidRequest(f"{where} has no {field}", param=within + field, code="missing_required_parameter")
    return fields[field]


def text(fields: Mapping[str, Any], field: str, within: str = "") -> str | None:
    """A field that is a text; None if it is not given."""
    value = fields.get(field)
    if value is not None and not isinstance(value, str):
        name = within + field
        raise InvalidRequest(f"{name} must be a text, got {value!r:.60}", param=name)
    return value


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values are the same in JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
