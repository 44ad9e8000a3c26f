"""Streams of /v1/completions and /v1/chat/completions: increments of the engine → chunks.

    writer = new_writer(request, submitted, model)
    chunks = writer.begin() + writer.add(number, increment) + ... + writer.end()

A chat's answer begins with its role, and the reason of its end has a chunk of its own, as in OpenAI's API. In a
completion the reason comes with the last text. The numbers of tokens come last, in a chunk without choices, if they
were asked for. Those so far are in every chunk, if that was asked for: they may count tokens whose text comes in the
next chunk.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from fastllama.engine.request import Request
from fastllama.engine.sequence import Increment
from fastllama.openai_api.answer_parts import CallArguments, CallBegin, Part, TextPart
from fastllama.openai_api.envelope import ServedModel, envelope
from fastllama.openai_api.errors import AnswerFailed
from fastllama.openai_api.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from fastllama.openai_api.requests import ApiRequest
from fastllama.openai_api.responses import finish_reason, usage, without_begin

Chunk = dict[str, Any]


class StreamWriter(Protocol):
    """Writes one stream."""

    def begin(self) -> list[Chunk]:
        """What comes before any answer."""

    def add(self, number: int, increment: Increment) -> list[Chunk]:
        """What an increment of the request of this number gives. Raises AnswerFailed for one that ends in an error."""

    def end(self) -> list[Chunk]:
        """What comes after all answers."""

    def fail(self, error: Chunk) -> list[Chunk]:
        """What ends a stream that cannot go on. error: its body in OpenAI's shape."""


class _Writer:
    """What the streams of both APIs have in common."""

    kind: str
    prefix: str

    def __init__(self, request: ApiRequest, submitted: Sequence[Request], model: ServedModel) -> None:
        self.request, self.submitted, self.model = request, submitted, model
        self._envelope = envelope(self.prefix, self.kind, model, request.model)

    def begin(self) -> list[Chunk]:
        """Nothing: the first chunk of an answer is its first increment."""
        return []

    def end(self) -> list[Chunk]:
        """The numbers of tokens, if they were asked for."""
        if not self.request.include_usage:
            return []
        return [{**self._envelope, "choices": [], "usage": self._usage()}]

    def _usage(self) -> dict[str, Any]:
        """The numbers of tokens so far."""
        return usage(self.request, [request.partial for request in self.submitted])

    def fail(self, error: Chunk) -> list[Chunk]:
        """The error."""
        return [error]

    def _choice_index(self, number: int, increment: Increment) -> int:
        if increment.finish_reason == "error":
            answer = self.submitted[number].partial.answers[increment.index]
            raise AnswerFailed(answer.error or "the answer failed")
        return number * self.request.params.n + increment.index

    def _chunk(self, index: int, finish_reason: str | None, **content: Any) -> Chunk:
        choice = {"index": index, **content, "finish_reason": finish_reason}
        chunk = {**self._envelope, "choices": [choice]}
        if not self.request.include_usage:
            return chunk
        return chunk | {"usage": self._usage() if self.request.continuous_usage else None}


class CompletionWriter(_Writer):
    """The stream of /v1/completions."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, request: ApiRequest, submitted: Sequence[Request], model: ServedModel) -> None:
        super().__init__(request, submitted, model)
        self._offsets: dict[int, TextOffsets] = {}  # of the answers that have begun

    def add(self, number: int, increment: Increment) -> list[Chunk]:
        """One chunk."""
        index, tokenizer = self._choice_index(number, increment), self.model.tokenizer
        text, n_left_out, ids = increment.text, 0, {}
        known: list[float | None] | None = None if increment.logprobs is None else list(increment.logprobs)
        if index not in self._offsets:
            self._offsets[index] = TextOffsets(tokenizer)
            ids["prompt_token_ids"] = self.submitted[number].partial.prompt_tokens
            if self.request.params.echo:  # the first increment is the prompt
                text, n_left_out = without_begin(self.request.prompts[number], text, tokenizer)
                if known:
                    known[0] = None  # of the first token nothing is known
        logprobs = None
        if known is not None:
            tokens, tops = increment.tokens[n_left_out:], increment.top_logprobs
            tops = tops[n_left_out:] if tops else None
            logprobs = completion_logprobs(tokenizer, tokens, known[n_left_out:], tops, self._offsets[index])
        if not text and not increment.finish_reason and not increment.tokens:
            return []
        ids["token_ids"] = increment.tokens[n_left_out:]
        more = ids if self.request.returns_tokens else {}
        return [self._chunk(index, increment.finish_reason, text=text, logprobs=logprobs, **more)]


class ChatWriter(_Writer):
    """The stream of /v1/chat/completions."""

    kind, prefix = "chat.completion.chunk", "chatcmpl"

    def __init__(self, request: ApiRequest, submitted: Sequence[Request], model: ServedModel) -> None:
        super().__init__(request, submitted, model)
        self._parsers = [request.new_parser() for _ in range(request.params.n)]

    def begin(self) -> list[Chunk]:
        """The role of every answer."""
        chunks = []
        for index, parser in enumerate(self._parsers):
            delta = {"role": "assistant", "content": "" if parser.has_text else None}
            chunks.append(self._chunk(index, None, delta=delta, logprobs=None))
        if self.request.returns_tokens:
            chunks[0]["prompt_token_ids"] = self.submitted[0].partial.prompt_tokens
        return chunks

    def add(self, number: int, increment: Increment) -> list[Chunk]:
        """A chunk for each part, and one for the end."""
        index = self._choice_index(number, increment)
        parts = self._parsers[index].push(increment.text)
        if increment.finish_reason is not None:
            parts += self._parsers[index].finish()
        deltas = [_delta(part) for part in parts]
        first: dict[str, Any] = {"logprobs": None}  # what the first chunk has beside its part
        if increment.tokens and self.request.returns_tokens:
            first["token_ids"] = increment.tokens
        if increment.tokens and increment.logprobs is not None:
            first["logprobs"] = chat_logprobs(
                self.model.tokenizer, increment.tokens, increment.logprobs, increment.top_logprobs
            )
        if len(first) > 1 or first["logprobs"] is not None:
            deltas = deltas or [{}]
        chunks = [
            self._chunk(index, None, delta=delta, **(first if at == 0 else {"logprobs": None}))
            for at, delta in enumerate(deltas)
        ]
        if increment.finish_reason is not None:
            reason = finish_reason(increment.finish_reason, self._parsers[index])
            chunks.append(self._chunk(index, reason, delta={}, logprobs=None))
        return chunks


def new_writer(request: ApiRequest, submitted: Sequence[Request], model: ServedModel) -> StreamWriter:
    """The writer of a request's stream."""
    return (ChatWriter if request.is_chat else CompletionWriter)(request, submitted, model)


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case TextPart(text):
            return {"content": text}
        case CallBegin(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
