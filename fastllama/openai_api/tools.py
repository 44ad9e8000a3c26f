"""The fields tools, tool_choice and parallel_tool_calls of a body → the functions that an answer may call."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastllama.engine.grammar import Grammar, is_installed
from fastllama.openai_api.call_formats import CallFormat, Function
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import UNSUPPORTED_CODE, flag, members, required, text

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAX_TOOLS = 128
FUNCTION, ALLOWED = "function", "allowed_tools"
FUNCTION_MEMBERS = ("name", "description", "parameters", "strict")
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
MODES = ("none", "auto", "required")


@dataclass(frozen=True)
class ToolUse:
    """What a request says about tools."""

    functions: Sequence[Function]  # of the request
    callable: Sequence[Function]  # those that the answer may call
    schemas: Sequence[Mapping[str, Any]]  # of all functions, for the prompt
    is_required: bool  # whether the answer must have a call
    has_several: bool  # whether it may have several
    is_flat: bool

    def grammar(self, form: CallFormat, answer: Mapping[str, Any] | None) -> Grammar:
        """The grammar of an answer in a format. answer: the JSON schema of an answer without calls.

        Raises InvalidRequest, which names the function whose schema is not supported.
        """
        new = functools.partial(form.grammar, is_required=self.is_required, has_several=self.has_several)
        try:
            return new(self.callable, answer=answer)
        except (ValueError, RecursionError) as error:
            raise self._refusal(new, error) from None

    def _refusal(self, new: Callable[[list[Function]], Grammar], error: Exception) -> InvalidRequest:
        """The error, with the function for which no grammar can be made alone."""
        name = "tools"
        if is_installed():
            for function in self.callable:
                try:
                    new([function])
                except (ValueError, RecursionError) as own:
                    name, error = f"{member_name(self.functions.index(function), self.is_flat)}.parameters", own
                    break
        if isinstance(error, RecursionError):
            return InvalidRequest(f"{name} is nested too deeply", param=name)
        return InvalidRequest(f"{name}: {error}", param=name)


def tool_use(fields: Mapping[str, Any], *, allow_unknown: bool, is_flat: bool = False) -> ToolUse | None:
    """The tools of a body; None if it has none. Raises InvalidRequest, which names the member.

    is_flat: a function's members stand beside its type, as in OpenAI's /v1/responses.
    """
    tools, choice = fields.get("tools", []), fields.get("tool_choice", "auto")
    has_several = flag(fields, "parallel_tool_calls", default=True)
    if not isinstance(tools, list):
        raise InvalidRequest(f"tools must be a list, got {tools!r:.60}", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools must be at most {MAX_TOOLS}, got {len(tools)}", param="tools")
    described = [_function(tool, index, allow_unknown, is_flat) for index, tool in enumerate(tools)]
    functions = [one for one, _ in described]
    names = [one.name for one in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            where = f"{member_name(index, is_flat)}.name"
            raise InvalidRequest(f"{where} must differ from those before it, got {name!r} again", param=where)
    chosen, is_required = _choice(choice, names, allow_unknown, is_flat)
    if not tools:
        if choice not in ("none", "auto"):
            raise InvalidRequest("tool_choice needs tools: give them, or leave it out", param="tool_choice")
        return None
    return ToolUse(
        functions=functions,
        callable=[one for one in functions if one.name in chosen],
        schemas=[{"type": FUNCTION, FUNCTION: schema} for _, schema in described],
        is_required=is_required,
        has_several=has_several,
        is_flat=is_flat,
    )


def member_name(index: int, is_flat: bool) -> str:
    """What errors call the object with a function's name."""
    return f"tools[{index}]" if is_flat else f"tools[{index}].{FUNCTION}"


def _function(tool: Any, index: int, allow_unknown: bool, is_flat: bool) -> tuple[Function, dict[str, Any]]:
    """A tool -> the function, and its description for the prompt."""
    name = f"tools[{index}]"
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != FUNCTION:
        wrong = f"{name}.type {kind!r:.60} is not supported: only functions are"
        raise InvalidRequest(wrong, param=f"{name}.type", code=UNSUPPORTED_CODE)
    found = members(tool, name, ("type", *(FUNCTION_MEMBERS if is_flat else (FUNCTION,))), allow_unknown=allow_unknown)
    text(found, "type", f"{name}.")
    required(found, "type", f"{name}.")
    if not is_flat:
        inner = required(found, FUNCTION, f"{name}.")
        name = member_name(index, is_flat)
        found = members(inner, name, FUNCTION_MEMBERS, allow_unknown=allow_unknown)
    function = required(found, "name", f"{name}.")
    if not isinstance(function, str) or not NAME.fullmatch(function):
        wrong = f"{name}.name must be 1 to 64 letters, digits, _ and -, got {function!r:.80}"
        raise InvalidRequest(wrong, param=f"{name}.name")
    text(found, "description", f"{name}.")
    is_strict = flag(found, "strict", within=f"{name}.")
    parameters = found.get("parameters", NO_PARAMETERS)
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        wrong = f'{name}.parameters must be a JSON schema of the type "object", got {parameters!r:.60}'
        raise InvalidRequest(wrong, param=f"{name}.parameters")
    parameters = {**parameters, "type": "object"}
    schema = {key: found[key] for key in ("name", "description") if key in found} | {"parameters": parameters}
    return Function(function, parameters, is_strict), schema


def _choice(choice: Any, names: Sequence[str], allow_unknown: bool, is_flat: bool) -> tuple[Sequence[str], bool]:
    """A tool_choice -> the functions that may be called, and whether one must be."""
    if isinstance(choice, str) and choice in MODES:
        return ([] if choice == "none" else names), choice == "required"
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == FUNCTION:
        return [_named(choice, "tool_choice", names, is_flat)], True
    if kind == ALLOWED:
        name = "tool_choice" if is_flat else f"tool_choice.{ALLOWED}"
        allowed = choice if is_flat else required(choice, ALLOWED, "tool_choice.")
        found = members(allowed, name, ("mode", "tools"), allow_unknown=allow_unknown, without_effect=("type",))
        mode, tools = required(found, "mode", f"{name}."), required(found, "tools", f"{name}.")
        if mode not in MODES[1:]:
            raise InvalidRequest(f"{name}.mode must be auto or required, got {mode!r:.60}", param=f"{name}.mode")
        if not isinstance(tools, list) or not tools:
            raise InvalidRequest(f"{name}.tools must be a list of functions, got {tools!r:.60}", param=f"{name}.tools")
        return [_named(one, f"{name}.tools[{i}]", names, is_flat) for i, one in enumerate(tools)], mode == "required"
    if isinstance(kind, str):
        wrong = f"tool_choice.type {kind!r:.60} is not supported: it may be {FUNCTION} or {ALLOWED}"
        raise InvalidRequest(wrong, param="tool_choice.type", code=UNSUPPORTED_CODE)
    wrong = f"tool_choice must be {', '.join(MODES)}, or an object that names a function, got {choice!r:.60}"
    raise InvalidRequest(wrong, param="tool_choice")


def _named(choice: Any, name: str, names: Sequence[str], is_flat: bool) -> str:
    """The function of {"type": "function", ...}."""
    holder = choice if is_flat or not isinstance(choice, dict) else choice.get(FUNCTION)
    name = name if is_flat else f"{name}.{FUNCTION}"
    function = holder.get("name") if isinstance(holder, dict) else None
    if not isinstance(function, str) or function not in names:
        known = ", ".join(names) or "none"
        raise InvalidRequest(f"{name}.name must be one of the tools ({known:.200}), got {function!r:.60}", param=name)
    return function
