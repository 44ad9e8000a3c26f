"""The generation loop: prefill, then decode steps until every row has reached a stop token or its token budget.

It yields each row's new tokens as increments; `generate` collects them, `stream` passes them on. The device samples,
tests for stop tokens and advances the rows (`decode_graph`). The host reads its output a few steps later, so it sees
the last stop token late and ignores the steps enqueued after it.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastllama import validate
from fastllama.decode_graph import Decoder
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import NO_TOKEN
from fastllama.model import Transformer
from fastllama.prefill import NOT_FINITE_CAUSE, prefill
from fastllama.tokenizer_base import BaseTokenizer, TextStream

FinishReason = Literal["stop", "length"]


class NotFiniteError(ValueError):
    """A row's logits are not finite numbers."""


@dataclass(frozen=True)
class Increment:
    """The new tokens of one row of a stream."""

    row: int  # the prompt's index
    tokens: list[int]  # never a stop token
    text: str  # the text these tokens complete; a character is never split
    logprobs: list[float] | None  # one per token; None if they were not requested
    finish_reason: FinishReason | None  # in a row's last increment: "stop" at a stop token, "length" at its budget


@dataclass(frozen=True)
class Request:
    """The checked arguments of a call."""

    prompts: list[list[int]]
    budgets: list[int]  # the most tokens that each row may generate
    stop_ids: frozenset[int]
    temperature: float
    top_p: float
    streams: list[tuple[int, int, int]]  # each row's (seed, stream, call)
    logprobs: bool
    echo: bool
    reuse_prefix: bool


def checked_request(
    model: Transformer,
    tokenizer: BaseTokenizer,
    random_streams: Callable[[list[int] | int | None, int], list[tuple[int, int, int]]],
    prompt_tokens: Sequence[Sequence[int]],
    max_gen_len: int,
    temperature: float,
    top_p: float,
    logprobs: bool,
    echo: bool,
    seed: int | Sequence[int] | None,
    *,
    reuse_prefix: bool,
) -> Request:
    """Check the arguments of `Llama.stream`, and that no other call uses the model -> the request."""
    params = model.params
    prompts = validate.prompts(
        prompt_tokens,
        vocab_size=params.vocab_size,
        max_batch_size=params.max_batch_size,
        max_seq_len=params.max_seq_len,
    )
    max_gen_len = validate.whole_number("max_gen_len", max_gen_len, 0)
    temperature, top_p = validate.temperature(temperature), validate.top_p(top_p)
    logprobs, echo = validate.flag("logprobs", logprobs), validate.flag("echo", echo)
    reuse_prefix = validate.flag("reuse_prefix", reuse_prefix)
    seeds = validate.seeds(seed, len(prompts))
    model.check_idle()
    stop_ids = validate.stop_ids(tokenizer.stop_tokens, params.vocab_size)
    budgets = [min(max_gen_len, params.max_seq_len - len(prompt)) for prompt in prompts]
    if echo:  # an echoed prompt with a stop token ends there
        budgets = [b if stop_ids.isdisjoint(prompt) else 0 for b, prompt in zip(budgets, prompts, strict=True)]
    model.cache.check_fits([len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True)])
    streams = random_streams(seeds, len(prompts))
    return Request(prompts, budgets, stop_ids, temperature, top_p, streams, logprobs, echo, reuse_prefix)


@dataclass
class _Row:
    """The host's view of a row, a few steps behind the device."""

    index: int
    prompt: list[int]
    last: int  # the last position that may get a token
    text: TextStream | None
    tokens: list[int]  # so far, the prompt's included
    finished: bool = False

    @property
    def length(self) -> int:
        """The number of tokens so far; also the position of the next one."""
        return len(self.tokens)

    def _increment(self, tokens: list[int], logprobs: list[float] | None, reason: FinishReason | None) -> Increment:
        """An increment of these tokens, with the text that they complete."""
        self.finished = reason is not None
        text = ""
        if self.text is not None:
            text = self.text.push(tokens) + (self.text.finish() if reason else "")
        return Increment(self.index, tokens, text, logprobs, reason)

    def first_increment(self, request: Request, scores: list[float] | None) -> Increment:
        """The increment before the first step: the prompt if it is echoed, and the end of a row without a budget."""
        echoed = self.prompt if request.echo else []
        stops = [place for place, token in enumerate(echoed) if token in request.stop_ids]
        end = stops[0] if stops else len(echoed)
        reason: FinishReason | None = "stop" if stops else "length" if self.finished else None
        logprobs = (scores[:end] if scores else []) if request.logprobs else None
        return self._increment(echoed[:end], logprobs, reason)

    def next_increments(self, request: Request, found: Sequence[tuple[int, float]]) -> Generator[Increment]:
        """The increment of one step's tokens and log-probabilities, up to the row's end; none if there are no tokens.

        Raises NotFiniteError, after the tokens before, if the logits of one were not numbers.
        """
        tokens: list[int] = []
        logprobs: list[float] | None = [] if request.logprobs else None
        reason: FinishReason | None = None
        for token, logprob in found:
            if token == NO_TOKEN or reason is not None:
                break
            if token in request.stop_ids:
                reason = "stop"
                break
            reason = "length" if self.length == self.last else None
            self.tokens.append(token)
            tokens.append(token)
            if logprobs is not None:
                logprobs.append(logprob)
        if tokens or reason is not None:
            yield self._increment(tokens, logprobs, reason)
        if reason is None and found and found[-1][0] == NO_TOKEN:
            raise NotFiniteError(
                f"the logits of row {self.index} are not finite numbers at step {self.length - len(self.prompt)} "
                f"(position {self.length}); {NOT_FINITE_CAUSE}"
            )


@torch.inference_mode()
def increments(decoder: Decoder, request: Request, tokenizer: BaseTokenizer | None) -> Generator[Increment]:
    """Run a request and yield each row's new tokens, with text if a tokenizer is given.

    The caller runs it under `default_settings`. It uses cache rows 0, 1, … of the decoder's model; nothing else may use
    them until the generator has ended or been closed. Raises ValueError, naming row and step, for logits that are not
    numbers.
    """
    rows = [
        _Row(
            index,
            prompt,
            last=len(prompt) - 1 + budget,
            text=TextStream(tokenizer) if tokenizer else None,
            tokens=list(prompt),
            finished=budget == 0,
        )
        for index, (prompt, budget) in enumerate(zip(request.prompts, request.budgets, strict=True))
    ]
    scoring = request.logprobs and request.echo
    if not scoring and all(row.finished for row in rows):
        yield from (row.first_increment(request, None) for row in rows)
        return
    # Uploaded here, at the first `next`: the CUDA stream that is current here is the call's.
    sampling = SamplingTensors.of(request.temperature, request.top_p, request.streams, decoder.model.device)
    n_cached = decoder.start(
        [row.prompt[-1] for row in rows],
        [row.length - 1 for row in rows],
        [row.last for row in rows],
        sorted(request.stop_ids),
        sampling,
        request.prompts if request.reuse_prefix and not scoring else None,
    )
    decoder.set_histories(dict(enumerate(request.prompts)))
    with decoder.launch_context():
        logits, scores = prefill(decoder.model, request.prompts, scoring, n_cached, decoder.guesser)
    try:
        yield from _decoded(decoder, request, rows, logits, scores)
    finally:
        if request.reuse_prefix:
            for row in rows:  # the newest token was not fed
                decoder.model.cache.remember(row.index, row.tokens[:-1])
            decoder.model.cache.release()  # what others may find is not written again


def _decoded(
    decoder: Decoder, request: Request, rows: list[_Row], logits: Tensor, scores: list[list[float]] | None
) -> Generator[Increment]:
    """Steps until all rows have ended, from the logits (B, V) of the prompts' last tokens."""
    for row in rows:
        if request.echo or row.finished:
            yield row.first_increment(request, scores[row.index] if scores else None)
    running = [row for row in rows if not row.finished]
    if running:
        with decoder.model.suited(len(rows), 0):
            decoder.sample_first(logits)
    while running:
        steps_left = max(row.last - row.length + 1 for row in running)  # the most that rows need beyond those received
        while steps_left > decoder.queued_steps and decoder.queued <= decoder.replays_ahead:
            with decoder.model.suited(len(rows), max(row.length for row in running)):
                decoder.enqueue_steps()
        newest = decoder.receive_newest()
        for row in running:
            n_known = row.length - len(row.prompt)
            found = decoder.control.new_tokens(newest, row.index, len(row.prompt), n_known)
            yield from row.next_increments(request, found)
        decoder.control.note_guesses(newest)
        for row in running:
            if row.finished:
                decoder.mark_finished(row.index)
        running = [row for row in running if not row.finished]
