"""A draft model: a smaller model with the same vocabulary, which guesses the next tokens of a larger one, the target.

It has keys and values of its own, in pages with the same numbers as the target's: a row's page table serves both, and
prompts that are found in the cache are there for both. A guess is drawn as the target draws: with the same random
numbers, at the same position. So where both models agree about the probabilities, they draw the same token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fastllama.args import EMBEDDING_NAME
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.guesses import NO_GUESS, Window
from fastllama.model import Transformer
from fastllama.quantization import bytes_of
from fastllama.speculation import (
    MAX_CATCH_UP,
    MAX_CHECKED_TOKENS,
    READ_TOGETHER,
    Guesser,
    LookupGuesser,
    window_batch,
)

READ_CACHED_TOKENS = 2048  # at a time


class DraftGuesser(Guesser):
    """The draft model reads each prompt with the target, then every token that the target draws."""

    def __init__(self, target: Transformer, draft: Transformer) -> None:
        """Both models have the same rows, lengths and pages, and vocabularies with the same tokens."""
        self._target, self.draft = target, draft
        self.cost = _step_bytes(draft) / _step_bytes(target)
        self._n_behind = 0  # steps without guesses, whose tokens the draft model has not read
        self._has_gaps = False  # rows have ended with such tokens, which a later prompt may find in the cache

    def prepare(self) -> None:
        """Follow the target, whose device, dtype and page table may be new, and clean the scratch memory."""
        target, draft, rows = self._target, self.draft, self._target.cache.max_batch_size
        draft.to(target.device, target.dtype)
        draft.cache.share_pages(target.cache)
        draft.allow_step_sizes(READ_TOGETHER, max(2 * rows, MAX_CHECKED_TOKENS))
        draft.workspace.reset()
        self._n_behind = 0

    def follow(self, batch: RaggedBatch) -> None:
        """Read tokens of prompts."""
        self.draft.hidden(replace(batch, workspace=self.draft.workspace))

    def read_cached(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Read tokens that a prompt found in the cache, by row, if the draft model may not have read them."""
        for row, tokens in prompts.items() if self._has_gaps else ():
            for begin in range(0, len(tokens), READ_CACHED_TOKENS):
                piece = row, begin, tokens[begin : begin + READ_CACHED_TOKENS]
                self.draft.hidden(RaggedBatch.of([piece], self.draft.device, self.draft.workspace))

    def end_row(self) -> None:
        """Remember whether the row has tokens that were not read."""
        self._has_gaps |= self._n_behind > 0

    def leave_out_row(self) -> None:
        """Remember that there are tokens that are not read."""
        self._has_gaps = True

    def before_step(self, state: DecodeState, n_guesses: int, lengths: Sequence[int]) -> None:
        """Before a step with guesses, read all tokens before the newest that were left out."""
        if n_guesses == 0:
            self._n_behind += 1
            return
        if self._n_behind and state.guesses is not None:
            state.guesses.tokens.fill_(NO_GUESS)  # those that are there are older than the newest tokens
        self._catch_up(state, min(self._n_behind, MAX_CATCH_UP), lengths)
        self._n_behind = 0

    def dry_run(self, state: DecodeState) -> None:
        """Compile the kernels of `before_step`."""
        self._catch_up(state, 1, None)

    def _catch_up(self, state: DecodeState, n_tokens: int, lengths: Sequence[int] | None) -> None:
        """Read n_tokens of each row before the newest one, or a few more: every window has the same size."""
        n_rows = state.rows.shape[0]
        size = READ_TOGETHER if n_rows * READ_TOGETHER <= MAX_CHECKED_TOKENS else 1
        for begin in range(-n_tokens // size * size, 0, size):
            self._hidden(self.draft.ops.window(state, begin, begin + size), state, lengths)

    def guess(self, state: DecodeState, n_guesses: int, lengths: Sequence[int] | None) -> None:
        """Draw the tokens after each row's newest one, each from the one before, in n_guesses steps of the draft model.

        The first step also reads the token before the newest: where all guesses were right, it was not read yet.
        """
        ops, draft = self.draft.ops, self.draft
        for number in range(n_guesses):
            window = ops.window(state, *((-1, 1) if number == 0 else (number, number + 1)))
            keys = None if lengths is None else [length + n_guesses + 1 + number for length in lengths]
            h, batch = self._hidden(window, state, keys)
            drawn, _ = ops.sample(draft.logits(h, batch), state.sampling, window.following, draft.workspace)
            ops.put_guess(state, number, drawn)

    def _hidden(self, window: Window, state: DecodeState, keys: Sequence[int] | None) -> tuple[Tensor, RaggedBatch]:
        batch = window_batch(self.draft, window, state.rows.shape[0], keys)
        return self.draft.hidden(batch), batch


def choose_guesser(kind: str | None, model: Transformer, draft: Transformer | None) -> Guesser | None:
    """The Guesser of `speculate=`."""
    if kind is None:
        return None
    return LookupGuesser(model) if draft is None else DraftGuesser(model, draft)


def _step_bytes(model: Transformer) -> int:
    """The bytes of the weights that a decode step reads: all but the embedding's table."""
    schemes, size = model.schemes, model.dtype.itemsize
    return sum(
        bytes_of(schemes[name], shape) if name in schemes else math.prod(shape) * size
        for name, shape in model.share.shapes.items()
        if name != EMBEDDING_NAME
    )
