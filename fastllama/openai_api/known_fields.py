"""The fields that OpenAI's and vLLM's APIs know: which are honoured, which change no answer, and which are refused.

The names are OpenAI's, and vLLM's where OpenAI has none. A field that would change the answer and is not supported is
refused, unless its value is the one that asks for nothing. What one API honours is refused in the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

NeutralValues = Mapping[str, tuple[Any, ...]]  # of fields that are not supported: the values that ask for nothing
NOTHING: NeutralValues = MappingProxyType({})


@dataclass(frozen=True)
class BodyFields:
    """The fields of one API's bodies."""

    honoured: frozenset[str]
    without_effect: frozenset[str]
    refused: NeutralValues
    instead: Mapping[str, str]  # of a refused field: what to use instead


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
STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats"})  # the second is vLLM's
UNSUPPORTED_STREAM_OPTIONS: NeutralValues = {"include_obfuscation": (False,)}
REFUSED: NeutralValues = {  # wherever they are not honoured
    "access_programs": (),
    "audio": (),
    "background": (False,),
    "background_options": (),
    "best_of": (1,),  # or as many as n
    "context_management": ([],),
    "conversation": (),  # nothing is stored, so neither this, nor an earlier response, nor its prompt is known
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "image": (),
    "include": ([],),
    "input": (),
    "instructions": ("",),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_output_tokens": (),
    "max_tokens": (),
    "messages": (),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "suffix": ("",),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's:
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),  # asks for a prefix cache of its own
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "ec_transfer_params": ({},),
    "guided_choice": (),
    "guided_decoding_backend": ("auto",),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True, False),  # no answer has a reasoning apart from its text
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "skip_special_tokens": (False,),  # answers have them by name
    "spaces_between_special_tokens": (True,),  # vLLM's default
    "stream_interval": (1,),
    "structural_tag": (),
    "structured_outputs": (),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),  # says nothing where nothing is truncated
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
COMMON_FIELDS = {"model", "max_tokens", "logprobs", "stream", "stream_options", "return_token_ids", *SAMPLING_FIELDS}
# They say who asks, what is kept, or how fast: not what is answered.
WITHOUT_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "safety_identifier", "service_tier", "request_id", "session_id"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction", "parallel_tool_calls"),
    }
)


def _fields(
    honoured: set[str], without_effect: frozenset[str], own: NeutralValues, instead: Mapping[str, str]
) -> BodyFields:
    """own: what is refused in this API only, or with other values."""
    accepted = honoured | without_effect
    refused = {name: values for name, values in {**REFUSED, **own}.items() if name not in accepted}
    return BodyFields(frozenset(honoured), without_effect - honoured, refused, instead)


COMPLETIONS = _fields(
    COMMON_FIELDS | {"prompt", "echo"},
    WITHOUT_EFFECT,
    {"add_special_tokens": (True,)},
    {
        "max_completion_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "top_logprobs": "logprobs",
        "messages": "prompt, or /v1/chat/completions",
        "input": "prompt",
    },
)
CHATS = _fields(
    {
        *COMMON_FIELDS,
        *("messages", "max_completion_tokens", "top_logprobs", "response_format"),
        *("tools", "tool_choice", "parallel_tool_calls"),
    },
    WITHOUT_EFFECT,
    {"add_special_tokens": (False,)},  # in vLLM, those beside what the chat template writes
    {
        "max_output_tokens": "max_completion_tokens",
        "prompt": "messages",
        "input": "messages",
        "instructions": "a message of the role system",
        "functions": "tools",
        "function_call": "tool_choice",
        **dict.fromkeys(("text", "structured_outputs", "guided_json"), "response_format"),
    },
)
RESPONSES = _fields(
    {
        *("model", "input", "instructions", "max_output_tokens", "top_logprobs", "include", "text", "reasoning"),
        *("tools", "tool_choice", "parallel_tool_calls", "stream", "stream_options"),
        *("metadata", "user", "safety_identifier", "prompt_cache_key"),  # repeated in the answer
        *(name for name in SAMPLING_FIELDS if name != "n"),
    },
    # max_tool_calls counts OpenAI's own tools, of which there are none here.
    WITHOUT_EFFECT | {"max_tool_calls"},
    {"add_special_tokens": (False,)},
    {
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_output_tokens"),
        **dict.fromkeys(("response_format", "structured_outputs", "guided_json"), "text.format"),
        "messages": "input",
        "logprobs": "include or top_logprobs",
        "functions": "tools",
        "function_call": "tool_choice",
    },
)
