"""Tools in Llama 3's chat format, for checkpoints without a template that writes them: as in Llama 3.1, in JSON.

The functions stand in the system message. A call is the whole answer: an object with the function's name and its
parameters. A result comes in a message of the role ipython.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastllama.tokenizer import Dialog, Message

RESULT_ROLE = "ipython"
INSTRUCTIONS = """You can call the functions below. Each is described by a JSON object.
To call a function, answer with one JSON object and nothing else: its "name" is the function's name, and its \
"parameters" are an object with the values of the function's parameters, such as
{"name": "function_name", "parameters": {"parameter_name": "value"}}
If no function helps, answer as usual, in words."""


def plain_dialog(dialog: Dialog, tools: Sequence[Mapping[str, Any]]) -> Dialog:
    """The same dialog in messages that have a role and a text: the tools are in the system message."""
    messages = [plain for message in dialog for plain in _plain_messages(message)]
    if not tools:
        return messages
    parts = [INSTRUCTIONS, *(json.dumps(tool, ensure_ascii=False) for tool in tools)]
    if messages[0]["role"] == "system":
        parts.insert(0, messages.pop(0)["content"].strip())
    return [_message("system", "\n\n".join(parts)), *messages]


def _plain_messages(message: Mapping[str, Any]) -> Iterator[Message]:
    """A message; one with several calls as several messages, because the format has one call in each."""
    content, calls = message.get("content"), message.get("tool_calls") or ()
    role = RESULT_ROLE if message["role"] == "tool" else message["role"]
    if content or not calls:
        yield _message(role, content or "")
    for call in calls:
        function = call["function"]
        text = json.dumps({"name": function["name"], "parameters": function["arguments"]}, ensure_ascii=False)
        yield _message(role, text)


def _message(role: Any, content: str) -> Message:
    return {"role": role, "content": content}
