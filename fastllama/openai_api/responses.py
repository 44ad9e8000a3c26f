"""Results of the engine → bodies of responses of /v1/completions and /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from fastllama.engine.prompts import Prompt
from fastllama.engine.request import Answer, Result
from fastllama.engine.sequence import FinishReason
from fastllama.openai_api.answer_parts import AnswerParser
from fastllama.openai_api.call_parser import joined
from fastllama.openai_api.envelope import ServedModel, envelope
from fastllama.openai_api.errors import AnswerFailed
from fastllama.openai_api.logprobs import chat_logprobs, completion_logprobs
from fastllama.openai_api.requests import ApiRequest
from fastllama.tokenizer_base import BaseTokenizer


def response(request: ApiRequest, results: Sequence[Result], model: ServedModel) -> dict[str, Any]:
    """The body that answers a request, whose prompts have these results. Raises AnswerFailed if an answer failed."""
    tokenizer = model.tokenizer
    choices: list[dict[str, Any]] = []
    for prompt, result in zip(request.prompts, results, strict=True):
        for answer in result.answers:
            if answer.error is not None:
                raise AnswerFailed(answer.error)
            choice = (
                _chat_choice(request, answer, tokenizer)
                if request.is_chat
                else _choice(request, prompt, result, answer, tokenizer)
            )
            choices.append({"index": len(choices), **choice})
    kind, prefix = ("chat.completion", "chatcmpl") if request.is_chat else ("text_completion", "cmpl")
    body = {**envelope(prefix, kind, model, request.model), "choices": choices, "usage": usage(request, results)}
    if request.returns_tokens and request.is_chat:
        body["prompt_token_ids"] = results[0].prompt_tokens
    return body


def usage(request: ApiRequest, results: Sequence[Result]) -> dict[str, Any]:
    """The numbers of tokens. Those of the answers are without stop tokens, and without an echoed prompt."""
    n_prompt = sum(len(result.prompt_tokens) for result in results)
    # In a stream an answer may not have its echo yet.
    n_answer = sum(
        max(0, len(answer.tokens) - n_echoed(request, result)) for result in results for answer in result.answers
    )
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in results)},
    }


def without_begin(prompt: Prompt, text: str, tokenizer: BaseTokenizer) -> tuple[str, int]:
    """An echoed text without the tokens that begin every text, and their number.

    A prompt of token ids is echoed as it came.
    """
    if not isinstance(prompt, str):
        return text, 0
    begin = tokenizer.encode("", bos=True, eos=False)
    space = " " if begin and tokenizer.strips_space else ""
    return text.removeprefix(tokenizer.decode(begin)).removeprefix(space), len(begin)


def n_echoed(request: ApiRequest, result: Result) -> int:
    """How many of an answer's first tokens repeat the prompt."""
    return len(result.prompt_tokens) if request.params.echo else 0


def finish_reason(reason: FinishReason | None, parser: AnswerParser) -> str | None:
    """Why an answer of a chat has ended. A call that a stop string has cut is none that a client could make."""
    return "tool_calls" if parser.has_whole_calls and reason == "stop" else reason


def _chat_choice(request: ApiRequest, answer: Answer, tokenizer: BaseTokenizer) -> dict[str, Any]:
    logprobs = None
    if answer.logprobs is not None:
        logprobs = chat_logprobs(tokenizer, answer.tokens, answer.logprobs, answer.top_logprobs)
    parser = request.new_parser()
    content, calls = joined([*parser.push(answer.text), *parser.finish()])
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls or not parser.has_text:
        message["content"] = content or None
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    choice: dict[str, Any] = {"message": message, "logprobs": logprobs}
    if request.returns_tokens:
        choice["token_ids"] = answer.tokens
    return {**choice, "finish_reason": finish_reason(answer.finish_reason, parser)}


def _choice(
    request: ApiRequest, prompt: Prompt, result: Result, answer: Answer, tokenizer: BaseTokenizer
) -> dict[str, Any]:
    text, n_added = answer.text, 0
    if request.params.echo:
        text, n_added = without_begin(prompt, text, tokenizer)
    logprobs = None
    if answer.logprobs is not None:
        known: list[float | None] = list(answer.logprobs)
        if request.params.echo:
            known[0] = None  # of the first token nothing is known
        tops = answer.top_logprobs
        logprobs = completion_logprobs(
            tokenizer, answer.tokens[n_added:], known[n_added:], tops[n_added:] if tops else None
        )
    choice: dict[str, Any] = {"text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason}
    if request.returns_tokens:
        choice |= {"token_ids": answer.tokens[n_added:], "prompt_token_ids": result.prompt_tokens}
    return choice
