"""Answers of /v1/responses: the events of a stream, and the object that ends it."""

import copy
import time
import uuid
from typing import Any

from fastllama.engine.request import Result
from fastllama.engine.sequence import Increment
from fastllama.openai_api.answer_parts import CallArguments, CallBegin, Part, TextPart
from fastllama.openai_api.errors import AnswerFailed
from fastllama.openai_api.input_items import CALL
from fastllama.openai_api.logprobs import chat_logprobs
from fastllama.openai_api.responses_api import ResponsesRequest
from fastllama.tokenizer_base import BaseTokenizer, TextStream

Event = dict[str, Any]
Entry = dict[str, Any]  # of one token in the log-probabilities


def response_object(request: ResponsesRequest, result: Result, tokenizer: BaseTokenizer, model: str) -> dict[str, Any]:
    """The body that answers a request. Raises AnswerFailed if the answer failed.

    model: the name of the model, where the request has none.
    """
    answer = result.answer
    if answer.error is not None:
        raise AnswerFailed(answer.error)
    writer = ResponseWriter(request, tokenizer, model)
    whole = Increment(0, answer.text, answer.tokens, answer.logprobs, answer.top_logprobs, None, None)
    writer.add(whole)
    found: dict[str, Any] = writer.end(result)[-1]["response"]
    return found


class ResponseWriter:
    """Writes the events of one response: `begin`, then `add` for every increment, and `end` or `fail`."""

    def __init__(self, request: ResponsesRequest, tokenizer: BaseTokenizer, model: str) -> None:
        self._repeated = dict(request.repeated) | {"model": request.request.model or model}
        self._tokenizer = tokenizer
        self._parser = request.request.new_parser()
        self._pieces = _TokenPieces(tokenizer)
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._output: list[dict[str, Any]] = []  # the items, of which the last may be open
        self._is_open = False
        self._entries: list[Entry] = []  # of tokens whose text has not come out of the parser
        self._number = 0
        self._events: list[Event] = []

    def begin(self) -> list[Event]:
        """The first events."""
        self._event("response.created", response=self._response("in_progress"))
        self._event("response.in_progress", response=self._response("in_progress"))
        return self._taken()

    def add(self, increment: Increment) -> list[Event]:
        """The events of what was generated."""
        for piece, entries in self._pieces.split(increment):
            self._entries += entries
            self._write(self._parser.push(piece))
        return self._taken()

    def end(self, result: Result) -> list[Event]:
        """The last events. The last one has the whole response."""
        answer = result.answer
        self._write(self._parser.finish())
        if answer.error is not None or answer.finish_reason == "cancelled":
            return self.fail(answer.error or "the answer was cancelled", result)
        if not self._output and self._parser.has_text:
            self._begin_message()
        status = "completed" if answer.finish_reason == "stop" else "incomplete"
        is_cut = self._is_open and self._output[-1]["type"] == CALL and not self._parser.has_whole_calls
        self._close("incomplete" if is_cut else status)
        self._event(f"response.{status}", response=self._response(status, result))
        return self._taken()

    def fail(self, message: str, result: Result | None = None) -> list[Event]:
        """The last events of a response that an error ends."""
        self._close("incomplete")
        error = {"code": "server_error", "message": message}
        self._event("response.failed", response=self._response("failed", result) | {"error": error})
        return self._taken()

    def _write(self, parts: list[Part]) -> None:
        for part in parts:
            if isinstance(part, TextPart):
                if not self._is_open or self._output[-1]["type"] != "message":
                    self._begin_message()
                self._add_text(part.text)
                continue
            self._entries = []  # those of a call are not in the answer
            if isinstance(part, CallBegin):
                self._begin_call(part)
            elif isinstance(part, CallArguments):
                self._output[-1]["arguments"] += part.text
                self._item_event("response.function_call_arguments.delta", delta=part.text)

    def _begin_message(self) -> None:
        self._close("completed")
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
        self._open(item | {"content": []})
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._item_event("response.content_part.added", content_index=0, part=copy.deepcopy(part))
        self._output[-1]["content"].append(part)

    def _add_text(self, added: str) -> None:
        part = self._output[-1]["content"][0]
        entries, self._entries = self._entries, []
        part["text"] += added
        part["logprobs"] += entries
        self._item_event("response.output_text.delta", content_index=0, delta=added, logprobs=entries)

    def _begin_call(self, part: CallBegin) -> None:
        self._close("completed")
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": CALL, "status": "in_progress"}
        self._open(item | {"call_id": part.id, "name": part.name, "arguments": ""})

    def _open(self, item: dict[str, Any]) -> None:
        self._output.append(item)
        self._is_open = True
        self._event("response.output_item.added", output_index=len(self._output) - 1, item=copy.deepcopy(item))

    def _close(self, status: str) -> None:
        """End the open item, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            done = {"text": part["text"], "logprobs": list(part["logprobs"])}
            self._item_event("response.output_text.done", content_index=0, **done)
            self._item_event("response.content_part.done", content_index=0, part=copy.deepcopy(part))
        else:
            self._item_event("response.function_call_arguments.done", arguments=item["arguments"])
        self._event("response.output_item.done", output_index=len(self._output) - 1, item=copy.deepcopy(item))

    def _item_event(self, kind: str, **members: Any) -> None:
        """An event about the last item."""
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        self._event(kind, **place, **members)

    def _event(self, kind: str, **members: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._number, **members})
        self._number += 1

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _response(self, status: str, result: Result | None = None) -> dict[str, Any]:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "output": copy.deepcopy(self._output),
            "usage": None if result is None else _usage(result),
            **self._repeated,
        }


class _TokenPieces:
    """Splits increments into the texts of their tokens, each with the token's log-probabilities."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer)
        self._n_ahead = 0  # characters that came before their token

    def split(self, increment: Increment) -> list[tuple[str, list[Entry]]]:
        """Texts and entries in order. Without log-probabilities the text is one piece."""
        left, pieces = increment.text, list[tuple[str, list[Entry]]]()
        if increment.logprobs is not None:
            found = chat_logprobs(self._tokenizer, increment.tokens, increment.logprobs, increment.top_logprobs)
            for token, entry in zip(increment.tokens, found["content"], strict=True):
                length = len(self._stream.push([token]))
                n_new = max(0, length - self._n_ahead)
                self._n_ahead -= length - n_new
                pieces.append((left[:n_new], [entry]))
                left = left[n_new:]
            self._n_ahead += len(left)
        return [*pieces, (left, [])] if left else pieces


def _usage(result: Result) -> dict[str, Any]:
    n_input, n_output = len(result.prompt_tokens), sum(len(answer.tokens) for answer in result.answers)
    return {
        "input_tokens": n_input,
        "input_tokens_details": {"cached_tokens": result.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": n_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": n_input + n_output,
    }
