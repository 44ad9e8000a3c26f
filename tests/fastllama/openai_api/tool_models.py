"""Tokenizers and chat templates of models that call tools, and what a grammar makes of a text."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from fastllama.chat_format import Formatter, choose_format
from fastllama.engine.grammar import Grammar
from fastllama.tokenizer_base import BaseTokenizer
from fastllama.tokenizer_open import open_tokenizer
from tests.support.pipelines import byte_level, write_pipeline

MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<think>"]
HERMES = """{%- if tools %}{{ '<|im_start|>system\\nYou may call:\\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}{% for message in messages %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
{%- if message.role == 'tool' %}{{ '<tool_response>' + message.content + '</tool_response>' }}
{%- elif message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first }}{{ '<tool_call>\\n{"name": "' + call.function.name }}
{{- '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA31 = """{{- bos_token }}{% for tool in tools or [] %}{{ tool | tojson(indent=4) }}

{% endfor %}{% for message in messages %}
{%- set role = 'ipython' if message.role == 'tool' else message.role %}{{ '<' + role + '>' }}
{%- if message.tool_calls %}
{%- if message.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set function = message.tool_calls[0].function %}
{{- '{"name": "' + function.name + '", "parameters": ' }}{{ function.arguments | tojson }}{{ '}' }}
{%- else %}{{ message.content | trim }}{% endif %}{{ eos_token }}{% endfor %}<assistant>"""
MISTRAL = """{{- bos_token }}{% for message in messages %}
{%- if message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}
{{- '[RESULT] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}
{%- elif message.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}
{%- else %}{% if loop.last and tools %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{% endif %}
{{- '[INST] ' + message.content }}{% endif %}{% endfor %}"""
# Mistral's templates write tools before the last message of the user; this one, before the first.
MISTRAL = MISTRAL.replace("loop.last and tools", "loop.first and tools")
TEMPLATES = {"hermes": HERMES, "llama3": LLAMA31, "mistral": MISTRAL}
NO_TOOLS = """{% for message in messages %}{{ message.role + ': ' + (message.content or '') + '\\n' }}{% endfor %}"""
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
ASKED = {"role": "user", "content": "Weather in Paris?"}


def called(*calls: tuple[str, str, str], content: str | None = None) -> dict[str, Any]:
    """A message with calls (id, name, arguments)."""
    listed = [
        {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": listed}


def write_model(folder: Path, template: str | None = None, markers: Sequence[str] = MARKERS) -> Path:
    """A folder with a tokenizer that has the markers as special tokens, and a chat template."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(markers))
    more = {} if template is None else {"chat_template": template}
    write_pipeline(tokenizer, folder, **more)
    return folder


def formatter_of(folder: Path, template: str | None = None, markers: Sequence[str] = MARKERS) -> Formatter:
    """The chat format of such a folder."""
    write_model(folder, template, markers)
    return choose_format(open_tokenizer(folder), [folder], is_meta=False)


class _Vocabulary:
    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(tokenizer.n_words)]
        self.special_token_ids = sorted(set(tokenizer.special_tokens.values()))

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(), bos=False, eos=False)


@functools.lru_cache
def _matching(tokenizer: BaseTokenizer) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))


def match(grammar: Grammar, tokenizer: BaseTokenizer, text: str, *, special: bool = True) -> str:
    """Whether a text is whole, the beginning of one, or wrong. special: markers in it are special tokens."""
    matcher = LLMatcher(_matching(tokenizer), grammar.source)
    assert not matcher.is_error(), matcher.get_error()
    allowed: Any = "all" if special else frozenset()
    tokens = tokenizer.encode(text, bos=False, eos=False, allowed_special=allowed)
    if matcher.try_consume_tokens(tokens) < len(tokens):
        return "wrong"
    return "whole" if matcher.is_accepting() else "beginning"
