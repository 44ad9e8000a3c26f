"""Which format a model's calls have: what its chat template makes of one tells."""

import re
import weakref
from typing import Any

from fastllama.chat_format import Formatter, NoFormat
from fastllama.openai_api.call_formats import CallFormat, HermesCalls, Llama3Calls, MistralCalls

TOOL, CALLED, RESULT = "name_of_a_tool", "name_of_a_call", "text_of_a_result"
CALL_ID = "callprobe"  # of nine letters, as Mistral's templates want
PROBE_TOOLS = [
    {
        "type": "function",
        "function": {"name": TOOL, "description": "?", "parameters": {"type": "object", "properties": {}}},
    }
]
PROBE: list[Any] = [
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": CALL_ID, "type": "function", "function": {"name": CALLED, "arguments": {"key": 7}}},
        ],
    },
    {"role": "tool", "tool_call_id": CALL_ID, "name": CALLED, "content": RESULT},
]
WRITTEN = rf'\{{\s*"name"\s*:\s*"{CALLED}"\s*,\s*"%s"\s*:\s*\{{\s*"key"\s*:\s*7\s*\}}\s*'
FORMATS: tuple[tuple[type[CallFormat], re.Pattern[str]], ...] = (
    (HermesCalls, re.compile(rf"<tool_call>\s*{WRITTEN % 'arguments'}\}}\s*</tool_call>")),
    (MistralCalls, re.compile(rf"\[TOOL_CALLS\]\s*\[\s*{WRITTEN % 'arguments'}[,}}]")),
    (Llama3Calls, re.compile(rf"{WRITTEN % 'parameters'}\}}")),
)

_known: weakref.WeakKeyDictionary[Formatter, CallFormat | str] = weakref.WeakKeyDictionary()


def call_format(formatter: Formatter) -> CallFormat:
    """The format of a model's calls. Raises ValueError with the reason if it has none that is known."""
    found = _known.get(formatter)
    if found is None:
        found = _known[formatter] = _detected(formatter)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _detected(formatter: Formatter) -> CallFormat | str:
    """The format, or why there is none."""
    if isinstance(formatter, NoFormat):
        return formatter.reason
    tokenizer = formatter.tokenizer
    try:
        prompt = tokenizer.decode(formatter.encode_dialog_prompt(PROBE, PROBE_TOOLS))
    except ValueError as error:
        return f"this model has no calls of tools: {error}"
    if TOOL not in prompt or RESULT not in prompt:
        return "this model's chat template does not write tools: its model was not trained to call them"
    for form, pattern in FORMATS:
        if pattern.search(prompt):
            try:
                return form(tokenizer)
            except ValueError as error:
                return f"this model's calls of tools cannot be read: {error}"
    return "this model's chat template writes calls of tools in a format that is not known"
