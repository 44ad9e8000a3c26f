"""Bodies of /v1/completions and /v1/chat/completions → prompts and SamplingParams, and their submission to an engine.

    request = completion_request({"prompt": "Once upon a time", "max_tokens": 16})
    results = [one.result() for one in submit(engine, request)]

What a body leaves out is as in OpenAI's API: temperature and top_p are 1, a completion has 16 tokens, and a chat's
answer may fill the context.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from fastllama import validate
from fastllama.chat_format import Formatter, Tools
from fastllama.engine.any_engine import AnyEngine
from fastllama.engine.prompts import Prompt
from fastllama.engine.request import Request
from fastllama.engine.sampling_params import SamplingParams
from fastllama.openai_api.answer_form import answer_form
from fastllama.openai_api.answer_parts import AnswerParser, PlainParser
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import flag, honoured_fields, members, required, text
from fastllama.openai_api.known_fields import (
    CHATS,
    COMPLETIONS,
    SAMPLING_FIELDS,
    STREAM_OPTIONS,
    UNSUPPORTED_STREAM_OPTIONS,
)
from fastllama.openai_api.messages import dialog
from fastllama.openai_api.response_format import answer_schema
from fastllama.openai_api.tools import tool_use
from fastllama.tokenizer import Dialog

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
MAX_ANSWERS = 128  # OpenAI's limit of n
LIMIT_CODE = "context_length_exceeded"
ALL_TOKENS = -1  # vLLM's value of top_k that keeps all
NO_LIMIT = 2**40  # of a prompt's tokens, where they are counted later


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """What a body asks for, in the engine's terms."""

    prompts: list[Prompt]  # of a chat: its dialog
    prompt_field: str  # the field of the body that holds them
    params: SamplingParams  # of every prompt
    is_chat: bool
    model: str | None = None
    stream: bool = False
    include_usage: bool = False  # in a stream
    continuous_usage: bool = False  # in each chunk
    returns_tokens: bool = False  # the ids of all tokens
    tools: Tools | None = None  # of a chat, for its prompt
    new_parser: Callable[[], AnswerParser] = PlainParser  # of each answer's text


def completion_request(body: object, *, allow_unknown: bool = False) -> ApiRequest:
    """The body of /v1/completions. Raises InvalidRequest, which names the field."""
    fields = {"max_tokens": COMPLETION_MAX_TOKENS} | honoured_fields(body, COMPLETIONS, allow_unknown=allow_unknown)
    more: dict[str, Any] = {"echo": flag(fields, "echo")}
    if "logprobs" in fields:
        more["logprobs"] = fields["logprobs"]
    prompts = _prompts(required(fields, "prompt"))
    params = sampling_params(fields, "max_tokens", more)
    rest = stream_fields(fields, allow_unknown)
    return ApiRequest(prompts=prompts, prompt_field="prompt", params=params, is_chat=False, **rest)


def chat_request(body: object, *, formatter: Formatter | None = None, allow_unknown: bool = False) -> ApiRequest:
    """The body of /v1/chat/completions. Raises InvalidRequest, which names the field.

    formatter: the model's, without which a body may not have tools.
    """
    fields = honoured_fields(body, CHATS, allow_unknown=allow_unknown)
    limit = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    if "max_tokens" in fields and fields["max_tokens"] != fields[limit]:
        raise InvalidRequest("max_tokens and max_completion_tokens are the same: give one of them", param="max_tokens")
    n_top = {"logprobs": fields.get("top_logprobs", 0)}
    checked("top_logprobs", n_top, "logprobs")
    has_logprobs = flag(fields, "logprobs")
    if n_top["logprobs"] and not has_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    messages = dialog(required(fields, "messages"), allow_unknown=allow_unknown)
    answer = answer_schema(fields.get("response_format"), allow_unknown=allow_unknown)
    use = tool_use(fields, allow_unknown=allow_unknown)
    form = answer_form(messages, answer, use, formatter, dialog_field="messages")
    return ApiRequest(
        prompts=[form.dialog],
        prompt_field="messages",
        params=sampling_params(fields, limit, (n_top if has_logprobs else {}) | {"grammar": form.grammar}),
        is_chat=True,
        tools=form.tools,
        new_parser=form.new_parser,
        **stream_fields(fields, allow_unknown),
    )


def encode(engine: AnyEngine, request: ApiRequest, max_prompt_tokens: int | None = None) -> list[list[int]]:
    """The token ids of every prompt. Raises InvalidRequest for one that does not fit the context, or is too long."""
    context, params = engine.facts.max_seq_len, request.params
    # The last token of a prompt that is only scored needs no place; an answer needs at least one.
    most = context + 1 if params.max_gen_len == 0 else context - 1
    encoded: list[list[int]] = []
    for number, prompt in enumerate(request.prompts):
        name = f"prompt {number}" if len(request.prompts) > 1 else "the prompt"
        try:
            if request.is_chat:
                prompt = engine.facts.formatter.encode_dialog_prompt(cast(Dialog, prompt), request.tools)
            tokens = engine.encode(prompt, spare=NO_LIMIT)
        except ValueError as error:
            raise InvalidRequest(str(error).replace("the prompt", name), param=request.prompt_field) from None
        if len(tokens) > most:
            where = "" if params.max_gen_len == 0 else ", with the answer"
            raise InvalidRequest(
                f"{name} has {len(tokens)} tokens, and {context} (max_seq_len) fit in the context{where}: shorten it",
                param=request.prompt_field,
                code=LIMIT_CODE,
            )
        if max_prompt_tokens is not None and len(tokens) > max_prompt_tokens:
            raise InvalidRequest(
                f"{name} has {len(tokens)} tokens, and at most {max_prompt_tokens} are taken here: shorten it",
                param=request.prompt_field,
                code=LIMIT_CODE,
            )
        encoded.append(tokens)
    return encoded


def submit(engine: AnyEngine, request: ApiRequest, max_prompt_tokens: int | None = None) -> list[Request]:
    """Submit all prompts of a request, or none. Raises InvalidRequest."""
    submitted: list[Request] = []
    try:
        for tokens in encode(engine, request, max_prompt_tokens):
            submitted.append(engine.submit(tokens, request.params, is_streamed=request.stream))
    except BaseException as error:
        for one in submitted:
            one.cancel()
        if isinstance(error, ValueError) and not isinstance(error, InvalidRequest):
            raise InvalidRequest(str(error)) from None
        raise
    return submitted


def sampling_params(fields: Mapping[str, Any], limit: str, more: dict[str, Any]) -> SamplingParams:
    """SamplingParams of a body. limit: the field that has the most tokens of an answer, if the body has it."""
    flag(fields, "ignore_eos")
    given = {name: fields[name] for name in SAMPLING_FIELDS if name in fields} | more
    if given.get("top_k") == ALL_TOKENS:
        given["top_k"] = 0
    if given.get("stop") == "":
        given["stop"] = []
    try:
        validate.whole_number("n", given.get("n", 1), 1, MAX_ANSWERS)
    except ValueError as error:
        raise InvalidRequest(str(error), param="n") from None
    for name, value in given.items():  # each alone, so that the error names it
        checked(name, {name: value})
    if given.get("top_p", 1) > 1:
        raise InvalidRequest(f"top_p must be a number from 0 to 1, got {given['top_p']}", param="top_p")
    arguments = {"temperature": 1.0, "top_p": 1.0} | given
    if limit not in fields:
        return checked(None, arguments)
    checked(limit, {"max_gen_len": fields[limit]})
    return checked(limit, arguments | {"max_gen_len": fields[limit]})


def checked(field: str | None, arguments: dict[str, Any], own_name: str = "max_gen_len") -> SamplingParams:
    """SamplingParams, with errors that name the body's field instead of our own."""
    try:
        return SamplingParams(**arguments)
    except ValueError as error:
        raise InvalidRequest(str(error).replace(own_name, field or own_name), param=field) from None


def stream_fields(fields: Mapping[str, Any], allow_unknown: bool) -> dict[str, Any]:
    """The fields about the model, streams and token ids, as arguments of ApiRequest."""
    stream, name = flag(fields, "stream"), "stream_options"
    options = members(
        fields.get(name, {}),
        name,
        STREAM_OPTIONS,
        allow_unknown=allow_unknown,
        unsupported=UNSUPPORTED_STREAM_OPTIONS,
    )
    include_usage = flag(options, "include_usage", within=f"{name}.")
    is_continuous = flag(options, "continuous_usage_stats", within=f"{name}.")
    if fields.get(name) and not stream:
        raise InvalidRequest(f"{name} needs stream to be true", param=name)
    return {
        "model": text(fields, "model"),
        "returns_tokens": flag(fields, "return_token_ids"),
        "stream": stream,
        "include_usage": include_usage,
        "continuous_usage": include_usage and is_continuous,
    }


def _prompts(value: Any) -> list[Prompt]:
    """One prompt, a text or token ids, or a list of them. The engine checks the ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, int) for one in value):
            return [value]
        if all(isinstance(one, str) for one in value) or all(isinstance(one, list) for one in value):
            return list(value)
    raise InvalidRequest(
        f"prompt must be a text, a list of token ids, or a list of texts or of lists of token ids, got {value!r:.60}",
        param="prompt",
    )
