"""The fields of a request's body: those that are honoured, those without effect, and those that are refused.

The names are OpenAI's, and vLLM's where OpenAI has none. A field that would change the answer and is not supported is
refused, unless its value is the one that asks for nothing.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from fastllama.openai_api.errors import InvalidRequest

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
COMMON_FIELDS = {"model", "max_tokens", "logprobs", "stream", "stream_options", *SAMPLING_FIELDS}
COMPLETION_FIELDS = frozenset(COMMON_FIELDS | {"prompt", "echo"})
CHAT_FIELDS = frozenset(COMMON_FIELDS | {"messages", "max_completion_tokens", "top_logprobs"})

# They say who asks, what is kept, or how fast: not what is answered.
WITHOUT_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "safety_identifier", "service_tier"),
        *("prompt_cache_key", "prompt_cache_retention", "prediction", "parallel_tool_calls"),
    }
)
# The values with which an unsupported field asks for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
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
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (False,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


def honoured_fields(body: object, known: frozenset[str], *, allow_unknown: bool) -> dict[str, Any]:
    """The fields of a body that are honoured; null means that a field is not given.

    Raises InvalidRequest, which names the field, for one that is not supported, and for an unknown one unless those
    are allowed.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be an object, got {body!r:.60}")
    fields: dict[str, Any] = {}
    for name, value in body.items():
        if name in known:
            if value is not None:
                fields[name] = value
        elif name in UNSUPPORTED:
            if value is not None and value not in UNSUPPORTED[name]:
                raise InvalidRequest(f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")
        elif name not in WITHOUT_EFFECT and not allow_unknown:
            raise InvalidRequest(_unknown_text(name, known), param=name, code="unknown_parameter")
    return fields


def _unknown_text(name: str, known: frozenset[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), 1)
    hint = f"did you mean {close[0]}?" if close else "leave it out"
    return f"{name[:60]!r} is not a field of this request: {hint}"
