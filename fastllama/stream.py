"""The loop of every call: prefill, then steps until every row has met a stop token or the end of its room.

What the rows gain comes out increment by increment; `generate` collects them, `stream` hands them on. The device
decides what a row does next (`decode_graph`); the host only follows, a few steps behind, to know which increments to
bring and when to end. So the last stop token is seen late, and what was queued after it is never looked at.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch

from fastllama.decode_graph import Decoder
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import NO_TOKEN
from fastllama.prefill import NOT_FINITE_CAUSE, prefill
from fastllama.tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length"]


class NotFiniteError(ValueError):
    """Logits are not numbers."""


@dataclass(frozen=True)
class Increment:
    """What one row of a stream has gained."""

    row: int  # the prompt's index
    tokens: list[int]  # never a stop token
    text: str  # the text these tokens complete; a character is never split
    logprobs: list[float] | None  # one per token, where they were asked for
    finish_reason: FinishReason | None  # in a row's last increment: it met a stop token, or the end of its room


@dataclass(frozen=True)
class Request:
    """A call, checked."""

    prompts: list[list[int]]
    budgets: list[int]  # tokens that each row may gain
    stop_ids: frozenset[int]
    temperature: float
    top_p: float
    streams: list[tuple[int, int, int]]  # each row's (seed, stream, call)
    logprobs: bool
    echo: bool


@dataclass
class _Row:
    """A row of a running stream, as the host follows it."""

    index: int
    prompt: list[int]
    last: int  # the last position that may get a token
    text: TextStream | None
    length: int  # tokens so far, the prompt's included: also where the next one will stand
    finished: bool = False

    def gain(self, tokens: list[int], logprobs: list[float] | None, reason: FinishReason | None) -> Increment:
        """The increment of these tokens, which stand in `length` already."""
        self.finished = reason is not None
        text = ""
        if self.text is not None:
            text = self.text.push(tokens) + (self.text.finish() if reason else "")
        return Increment(self.index, tokens, text, logprobs, reason)

    def begin(self, request: Request, scores: list[float] | None) -> Increment:
        """What a row has before its first step: its prompt where that is echoed, its end where it has no room."""
        echoed = self.prompt if request.echo else []
        stops = [place for place, token in enumerate(echoed) if token in request.stop_ids]
        end = stops[0] if stops else len(echoed)
        reason: FinishReason | None = "stop" if stops else "length" if self.finished else None
        logprobs = (scores[:end] if scores else []) if request.logprobs else None
        return self.gain(echoed[:end], logprobs, reason)

    def step(self, request: Request, token: int, logprob: float) -> Increment:
        """What a step brought: the token at position `length`."""
        if token == NO_TOKEN:
            raise NotFiniteError(
                f"the logits of row {self.index} are not finite numbers at step {self.length - len(self.prompt)} "
                f"(position {self.length}); {NOT_FINITE_CAUSE}"
            )
        if token in request.stop_ids:
            return self.gain([], [] if request.logprobs else None, "stop")
        reason: FinishReason | None = "length" if self.length == self.last else None
        self.length += reason is None
        return self.gain([token], [logprob] if request.logprobs else None, reason)


@torch.inference_mode()
def increments(decoder: Decoder, request: Request, tokenizer: Tokenizer | None) -> Generator[Increment]:
    """Run a request, bringing increments as rows gain tokens, with text where a tokenizer is given.

    The caller's settings of torch are to be put aside around it. Uses cache rows 0, 1, … of the decoder's model;
    nothing else may use them until the iterator has ended or been closed. Raises ValueError, naming row and step, for
    logits that are not numbers.
    """
    rows = [
        _Row(
            index,
            prompt,
            last=len(prompt) - 1 + budget,
            text=TextStream(tokenizer) if tokenizer else None,
            length=len(prompt),
            finished=budget == 0,
        )
        for index, (prompt, budget) in enumerate(zip(request.prompts, request.budgets, strict=True))
    ]
    scoring = request.logprobs and request.echo
    if not scoring and all(row.finished for row in rows):
        yield from (row.begin(request, None) for row in rows)
        return
    # Not before: on a GPU the stream that is current now is the call's, whichever was when it was asked for.
    sampling = SamplingTensors.of(request.temperature, request.top_p, request.streams, decoder.model.device)
    decoder.begin(
        [row.prompt[-1] for row in rows],
        [row.length - 1 for row in rows],
        [row.last for row in rows],
        sorted(request.stop_ids),
        sampling,
    )
    with decoder.launching():
        logits, scores = prefill(decoder.model, request.prompts, scoring)
    for row in rows:
        if request.echo or row.finished:
            yield row.begin(request, scores[row.index] if scores else None)
    running = [row for row in rows if not row.finished]
    if running:
        with decoder.model.suited(len(rows), 0):
            decoder.choose(logits)
    wanted = max(request.budgets) - 1  # steps that can still bring something
    while running:
        while wanted > 0 and decoder.queued <= decoder.ahead:
            with decoder.model.suited(len(rows), max(row.length for row in running)):
                decoder.launch()
            wanted -= decoder.unroll
        for tokens, logprobs in decoder.receive():
            yield from (row.step(request, tokens[row.index], logprobs[row.index]) for row in running)
            for row in running:
                if row.finished:
                    decoder.finish(row.index)
            running = [row for row in running if not row.finished]
