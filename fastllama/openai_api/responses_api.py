"""The body of OpenAI's /v1/responses → an ApiRequest, and the fields that its response repeats.

Nothing is stored: a body that refers to an earlier response or to a conversation is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastllama.chat_format import Formatter
from fastllama.openai_api.answer_form import answer_form
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import flag, honoured_fields, members, required, text
from fastllama.openai_api.input_items import input_dialog
from fastllama.openai_api.known_fields import RESPONSES, NeutralValues
from fastllama.openai_api.requests import ApiRequest, checked, sampling_params, stream_fields
from fastllama.openai_api.response_format import answer_schema
from fastllama.openai_api.tools import tool_use

LOGPROBS = "message.output_text.logprobs"
# What else a body may include belongs to items that no answer here has.
INCLUDABLE = (
    LOGPROBS,
    *("reasoning.encrypted_content", "file_search_call.results", "web_search_call.results"),
    *("web_search_call.action.sources", "computer_call_output.output.image_url"),
    *("code_interpreter_call.outputs", "message.input_image.image_url"),
)
UNSUPPORTED_REASONING: NeutralValues = {
    "context": ("auto",),
    "effort": ("none",),
    "generate_summary": (),
    "mode": ("standard",),
    "summary": ("auto",),  # of reasoning, where there is any
}
UNSUPPORTED_TEXT: NeutralValues = {"verbosity": ("medium",)}
REPEATED = ("metadata", "user", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True, kw_only=True)
class ResponsesRequest:
    """A request of /v1/responses."""

    request: ApiRequest
    repeated: Mapping[str, Any]  # the fields of the body that its response has, too


def responses_request(
    body: object, *, formatter: Formatter | None = None, allow_unknown: bool = False
) -> ResponsesRequest:
    """The body of /v1/responses. Raises InvalidRequest, which names the field.

    formatter: the model's, without which a body may not have tools.
    """
    fields = honoured_fields(body, RESPONSES, allow_unknown=allow_unknown)
    members(
        fields.get("reasoning", {}),
        "reasoning",
        (),
        allow_unknown=allow_unknown,
        unsupported=UNSUPPORTED_REASONING,
    )
    dialog = input_dialog(required(fields, "input"), text(fields, "instructions"))
    options = members(
        fields.get("text", {}), "text", ("format",), allow_unknown=allow_unknown, unsupported=UNSUPPORTED_TEXT
    )
    answer = answer_schema(options.get("format"), allow_unknown=allow_unknown, name="text.format")
    use = tool_use(fields, allow_unknown=allow_unknown, is_flat=True)
    form = answer_form(dialog, answer, use, formatter, dialog_field="input")
    request = ApiRequest(
        prompts=[form.dialog],
        prompt_field="input",
        params=sampling_params(fields, "max_output_tokens", _logprobs(fields) | {"grammar": form.grammar}),
        is_chat=True,
        tools=form.tools,
        new_parser=form.new_parser,
        **stream_fields(fields, allow_unknown),
    )
    return ResponsesRequest(request=request, repeated=_repeated(fields, options, request))


def _logprobs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """SamplingParams' logprobs, which `include` or `top_logprobs` asks for."""
    include = fields.get("include", [])
    if not isinstance(include, list):
        raise InvalidRequest(f"include must be a list, got {include!r:.60}", param="include")
    for one in include:
        if one not in INCLUDABLE:
            raise InvalidRequest(f"include may have {', '.join(INCLUDABLE)}, got {one!r:.60}", param="include")
    if LOGPROBS not in include and not fields.get("top_logprobs"):
        return {}
    found = {"logprobs": fields.get("top_logprobs", 0)}
    checked("top_logprobs", found, "logprobs")
    return found


def _repeated(fields: Mapping[str, Any], options: Mapping[str, Any], request: ApiRequest) -> dict[str, Any]:
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
        raise InvalidRequest(f"metadata must be an object of texts, got {metadata!r:.60}", param="metadata")
    for name in REPEATED[1:]:
        text(fields, name)
    params = request.params
    return {
        "background": False,
        "instructions": fields.get("instructions"),
        "max_output_tokens": params.max_gen_len,
        "max_tool_calls": None,
        "parallel_tool_calls": flag(fields, "parallel_tool_calls", default=True),
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": {"format": options.get("format", {"type": "text"}), "verbosity": "medium"},
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": fields.get("tools", []),
        "top_logprobs": params.logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        **{name: fields.get(name) for name in REPEATED},
        "metadata": metadata,
    }
