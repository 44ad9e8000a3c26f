"""What a chat asks of its answer beyond sampling: a JSON schema, and calls of tools."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastllama.chat_format import Formatter, Tools, has_calls
from fastllama.engine.grammar import Grammar
from fastllama.openai_api.answer_parts import AnswerParser, PlainParser
from fastllama.openai_api.call_detection import call_format
from fastllama.openai_api.call_formats import CallFormat
from fastllama.openai_api.call_parser import CallParser
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import UNSUPPORTED_CODE
from fastllama.openai_api.response_format import AnswerSchema
from fastllama.openai_api.tools import ToolUse


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """The dialog as the model's template takes it, and the form of the answer."""

    dialog: list[Any]
    tools: Tools | None  # for the prompt
    grammar: Grammar | None
    new_parser: Callable[[], AnswerParser]


def answer_form(
    dialog: list[Any],
    answer: AnswerSchema | None,
    use: ToolUse | None,
    formatter: Formatter | None,
    *,
    dialog_field: str,
) -> AnswerForm:
    """The form of a chat's answer. Raises InvalidRequest for tools that the model, or a grammar, does not support.

    answer: what an answer without calls follows; None: any text. dialog_field: the name of the dialog's field.
    """
    grammar = None if answer is None else answer.grammar
    form = None
    if use is not None or has_calls(dialog):
        form = _call_format(formatter, "tools" if use is not None else dialog_field)
        dialog = [_with_template_ids(message, form) for message in dialog]
    new_parser: Callable[[], AnswerParser] = PlainParser
    if form is not None and use is not None and use.callable:
        grammar = use.grammar(form, None if answer is None else answer.schema)
        patterns = form.patterns(one.name for one in use.callable)
        new_parser = functools.partial(CallParser, patterns, has_text=not use.is_required)
    tools = None if use is None else use.schemas
    return AnswerForm(dialog=dialog, tools=tools, grammar=grammar, new_parser=new_parser)


def _call_format(formatter: Formatter | None, field: str) -> CallFormat:
    try:
        if formatter is None:
            raise ValueError("this model has no calls of tools")
        return call_format(formatter)
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error}", param=field, code=UNSUPPORTED_CODE) from None


def _with_template_ids(message: Mapping[str, Any], form: CallFormat) -> dict[str, Any]:
    """The message with the ids of calls as the template takes them."""
    changed = dict(message)
    if "tool_calls" in message:
        changed["tool_calls"] = [{**call, "id": form.template_id(call["id"])} for call in message["tool_calls"]]
    if "tool_call_id" in message:
        changed["tool_call_id"] = form.template_id(message["tool_call_id"])
    return changed
