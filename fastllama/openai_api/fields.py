"""The fields of a request's body: those that are honoured, those without effect, and those that are refused.

The names are OpenAI's, and vLLM's where OpenAI has none. A field that would change the answer and is not supported is
refused, unless its value is the one that asks for nothing.
"""

import difflib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from fastllama.openai_api.errors import InvalidRequest

UNSUPPORTED_CODE = "unsupported_parameter"
MAX_NAME_CHARS = 200
NOTHING: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
SAMPLING_FIELDS = (  # of the same name and meaning in SamplingParams
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "min_tokens",
    "stop_token_ids",
)
COMMON_FIELDS = {"model", "max_tokens", "logprobs", "stream", "stream_options", "return_token_ids", *SAMPLING_FIELDS}
COMPLETION_FIELDS = frozenset(COMMON_FIELDS | {"prompt", "echo"})
CHAT_FIELDS = frozenset(
    {
        *COMMON_FIELDS,
        *("messages", "max_completion_tokens", "top_logprobs", "response_format"),
        *("tools", "tool_choice", "parallel_tool_calls"),
    }
)
STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats"})  # the second is vLLM's

# They say who asks, what is kept, or how fast: not what is answered.
WITHOUT_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "safety_identifier", "service_tier"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction", "parallel_tool_calls"),
    }
)
# The values with which an unsupported field asks for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),  # in a completion, as are tools and tool_choice
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's:
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),  # in a chat
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "max_completion_tokens": (),  # in a completion, as is the next but one
    "prompt_logprobs": (),
    "top_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (False,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
RESPONSES_FIELDS = frozenset(
    {
        *("model", "input", "instructions", "max_output_tokens", "top_logprobs", "include", "text", "reasoning"),
        *("tools", "tool_choice", "parallel_tool_calls", "stream", "stream_options"),
        *("metadata", "user", "safety_identifier", "prompt_cache_key"),  # repeated in the answer
        *(name for name in SAMPLING_FIELDS if name != "n"),
    }
)
UNSUPPORTED_IN_RESPONSES: Mapping[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),  # nothing is stored, so neither this, nor an earlier response, nor a prompt is known
    "image": (),
    "moderation": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "return_token_ids": (False,),
    "truncation": ("disabled",),
}
# max_tool_calls counts OpenAI's own tools, of which there are none here.
WITHOUT_EFFECT_IN_RESPONSES = frozenset(
    {"store", "max_tool_calls", "prompt_cache_options", "prompt_cache_retention", "service_tier"}
)
UNSUPPORTED_STREAM_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "include_obfuscation": (False,),
}


def honoured_fields(body: object, known: frozenset[str], *, allow_unknown: bool) -> dict[str, Any]:
    """The fields of a body that are honoured; null means that a field is not given.

    Raises InvalidRequest, which names the field, for one that is not supported, and for an unknown one unless those
    are allowed.
    """
    return members(body, "", known, allow_unknown=allow_unknown, unsupported=UNSUPPORTED, without_effect=WITHOUT_EFFECT)


def members(
    value: object,
    name: str,
    known: Collection[str],
    *,
    allow_unknown: bool,
    unsupported: Mapping[str, tuple[Any, ...]] = NOTHING,
    without_effect: Collection[str] = (),
) -> dict[str, Any]:
    """The members of an object that are honoured, as `honoured_fields`. name: of the object in the body, "" of that."""
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
                raise InvalidRequest(f"{full} is not supported: leave it out", param=full, code=UNSUPPORTED_CODE)
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
