"""The input of /v1/responses → a dialog with calls of tools, as `messages.py` makes of a chat's messages."""

from typing import Any

from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import UNSUPPORTED_CODE
from fastllama.openai_api.messages import ASSISTANT, ROLES, SYSTEM, TOOL, USER, call, content_text, result

MESSAGE, CALL, OUTPUT = "message", "function_call", "function_call_output"
TEXTS = {ASSISTANT: ("output_text", "input_text"), USER: ("input_text",), SYSTEM: ("input_text",)}


def input_dialog(value: Any, instructions: str | None) -> list[Any]:
    """The dialog of an input, a text or a list of items. Raises InvalidRequest, which names the part of an item."""
    items = [{"role": USER, "content": value}] if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise InvalidRequest(f"input must be a text or a list of items, got {value!r:.60}", param="input")
    dialog: list[dict[str, Any]] = []
    known: dict[str, str] = {}  # the functions of the calls so far, by the calls' ids
    for index, item in enumerate(items):
        _add(item, f"input[{index}]", dialog, known)
    if instructions and dialog[0]["role"] == SYSTEM:  # templates want one message of the system
        dialog[0]["content"] = f"{instructions}\n\n{dialog[0]['content']}"
    elif instructions:
        dialog.insert(0, {"role": SYSTEM, "content": instructions})
    return dialog


def _add(item: Any, name: str, dialog: list[dict[str, Any]], known: dict[str, str]) -> None:
    """Add an item to the dialog. A call joins the message of the assistant before it."""
    if not isinstance(item, dict):
        raise InvalidRequest(f"{name} must be an object, got {item!r:.60}", param=name)
    kind = item.get("type", MESSAGE)
    if kind == CALL:
        call_id = item.get("call_id")
        if not isinstance(call_id, str):
            raise InvalidRequest(f"{name}.call_id must be a text, got {call_id!r:.60}", param=f"{name}.call_id")
        if not dialog or dialog[-1]["role"] != ASSISTANT:
            dialog.append({"role": ASSISTANT})
        dialog[-1].setdefault("tool_calls", []).append(call(call_id, item.get("name"), item.get("arguments"), name))
        known[call_id] = item["name"]
    elif kind == OUTPUT:
        content = content_text(item.get("output"), f"{name}.output", ("input_text",))
        dialog.append(result(item.get("call_id"), content, known, f"{name}.call_id"))
    elif kind == MESSAGE:
        role = item.get("role")
        if not isinstance(role, str) or role not in ROLES or role == TOOL:
            roles = ", ".join(one for one in ROLES if one != TOOL)
            raise InvalidRequest(f"{name}.role must be one of {roles}, got {role!r:.60}", param=f"{name}.role")
        content = content_text(item.get("content"), f"{name}.content", TEXTS[ROLES[role]])
        dialog.append({"role": ROLES[role], "content": content})
    else:
        wrong = f"{name}.type must be {MESSAGE}, {CALL} or {OUTPUT}, got {kind!r:.60}"
        raise InvalidRequest(wrong, param=f"{name}.type", code=UNSUPPORTED_CODE)
