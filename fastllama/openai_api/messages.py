"""The messages of a chat's body → a dialog with calls of tools, in the terms of transformers' chat templates."""

from collections.abc import Mapping
from typing import Any

from fastllama import strict_json
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import UNSUPPORTED_CODE, required, text

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
UNSUPPORTED_MEMBERS = ("audio", "function_call", "refusal")  # whatever the role


def dialog(value: Any, *, allow_unknown: bool) -> list[Any]:
    """The messages of a chat, checked. Raises InvalidRequest, which names the part of a message."""
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"messages must be a list with at least one message, got {value!r:.60}", param="messages")
    known: dict[str, str] = {}  # the functions of the calls so far, by the calls' ids
    return [_message(message, f"messages[{index}]", known, allow_unknown) for index, message in enumerate(value)]


def call(call_id: Any, function: Any, arguments: Any, name: str) -> dict[str, Any]:
    """A call of an earlier answer. name: of the object in the body that has the function's name and arguments.

    Arguments that are an empty text are those of a call without arguments, as in vLLM.
    """
    for field, value in (("name", function), ("arguments", arguments)):
        if not isinstance(value, str):
            raise InvalidRequest(f"{name}.{field} must be a text, got {value!r:.60}", param=f"{name}.{field}")
    try:
        found = strict_json.loads(arguments, max_depth=strict_json.MAX_DEPTH) if arguments.strip() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        wrong = f"{name}.arguments must be the JSON text of an object, got {arguments!r:.60}"
        raise InvalidRequest(wrong, param=f"{name}.arguments")
    return {"id": call_id, "type": "function", "function": {"name": function, "arguments": found}}


def result(call_id: Any, content: str, known: Mapping[str, str], name: str) -> dict[str, Any]:
    """A message with the result of a call. known: the functions of the calls so far. name: of the id in the body."""
    if not isinstance(call_id, str) or call_id not in known:
        raise InvalidRequest(f"{name} must be the id of a call in a message before it, got {call_id!r:.60}", param=name)
    return {"role": TOOL, "tool_call_id": call_id, "name": known[call_id], "content": content}


def content_text(content: Any, name: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """A message's text, which may come in parts of these kinds."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts: list[str] = []
    for part in parts:
        piece = part.get("text") if isinstance(part, dict) and part.get("type") in kinds else None
        if not isinstance(piece, str):
            wrong = f"{name} must be a text or a list of parts of the type {' or '.join(kinds)}, got {content!r:.60}"
            raise InvalidRequest(wrong, param=name)
        texts.append(piece)
    return "".join(texts)


def _message(message: Any, name: str, known: dict[str, str], allow_unknown: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{name} must be an object with role and content, got {message!r:.60}", param=name)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        roles = ", ".join(ROLES)
        raise InvalidRequest(f"{name}.role must be one of {roles}, got {role!r:.60}", param=f"{name}.role")
    honoured = {"role", "content", "name", *{ASSISTANT: ("tool_calls",), TOOL: ("tool_call_id",)}.get(role, ())}
    for field, value in message.items():
        is_refused = field in UNSUPPORTED_MEMBERS or field in ("tool_calls", "tool_call_id") or not allow_unknown
        if field not in honoured and is_refused and value not in (None, []):
            full = f"{name}.{field}"
            raise InvalidRequest(f"{full} is not supported: leave it out", param=full, code=UNSUPPORTED_CODE)
    calls = _calls(message.get("tool_calls"), f"{name}.tool_calls")
    known |= {one["id"]: one["function"]["name"] for one in calls}
    content = message.get("content")
    speaker = text(message, "name", f"{name}.")  # for templates that write it
    found: dict[str, Any] = {"role": ROLES[role]} | ({"name": speaker} if speaker else {})
    if content is not None or not calls:
        found["content"] = content_text(content, f"{name}.content")
    if role == TOOL:  # its name is that of the call's function, whatever the message says
        return result(message.get("tool_call_id"), found["content"], known, f"{name}.tool_call_id")
    return found | ({"tool_calls": calls} if calls else {})


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} must be a list of calls, got {value!r:.60}", param=name)
    calls = []
    for index, one in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(one, dict) or one.get("type", "function") != "function":
            raise InvalidRequest(f"{where} must be a call of the type function, got {one!r:.60}", param=where)
        function = required(one, "function", f"{where}.")
        if not isinstance(function, dict):
            raise InvalidRequest(f"{where}.function must be an object, got {function!r:.60}", param=f"{where}.function")
        call_id = required(one, "id", f"{where}.")
        if not isinstance(call_id, str):
            raise InvalidRequest(f"{where}.id must be a text, got {call_id!r:.60}", param=f"{where}.id")
        calls.append(call(call_id, function.get("name"), function.get("arguments"), f"{where}.function"))
    return calls
