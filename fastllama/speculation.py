"""Lossless speculation: steps that check guesses of the next tokens, and where the guesses come from.

A step reads the weights once, for one token or for several. So several tokens are guessed, and one step draws the
token after each of them. `fastllama.kernels.guesses` says why the result is that of single steps.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastllama.kernels.batch import RaggedBatch, Segment
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.guesses import MAX_GUESSES
from fastllama.model import Transformer


class Guesser(Protocol):
    """Where guesses come from."""

    def guess(self, state: DecodeState, n_guesses: int) -> None:
        """Guess the tokens after each row's newest one, at least n_guesses. Can be captured in a graph."""


class LookupGuesser:
    """A row goes on as it did at an earlier place of its prompt or answer. Costs next to nothing, so it always runs."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def guess(self, state: DecodeState, n_guesses: int) -> None:
        self._ops.look_up(state, MAX_GUESSES)


def checked_step(
    model: Transformer, state: DecodeState, guesser: Guesser, n_guesses: int, lengths: Sequence[int] | None
) -> None:
    """Check n_guesses of every row, advance the rows by 1 to n_guesses + 1 tokens, and guess again.

    lengths: as in `step`.
    """
    window = model.ops.window(state, 0, n_guesses + 1)
    keys = lengths or [model.cache.max_seq_len] * state.rows.shape[0]
    size, most = n_guesses + 1, model.cache.length
    segments = (Segment(row, row * size, (row + 1) * size, min(n + n_guesses, most)) for row, n in enumerate(keys))
    batch = RaggedBatch(
        tokens=window.tokens,
        positions=window.positions,
        rows=window.rows,
        segments=tuple(segments),
        exact=False,  # steps may be queued whose numbers of tokens are not known
        workspace=model.workspace,
        tokens_per_row=size,
    )
    logits = model.logits(model.hidden(batch), batch)
    advance(model, state, guesser, n_guesses, logits, window.following)


def advance(
    model: Transformer, state: DecodeState, guesser: Guesser, n_guesses: int, logits: Tensor, following: Tensor
) -> None:
    """The end of a step: draw from logits (B·S, V) for the positions `following`, accept, and guess again."""
    drawn, logprobs = model.ops.sample(logits, state.sampling, following, model.workspace)
    model.ops.accept(state, drawn, logprobs)
    guesser.guess(state, n_guesses)


def record(state: DecodeState, was_running: Tensor) -> None:
    """Note the newest tokens of a step that did not check guesses, in plain torch: those of rows that ran before it."""
    guesses = state.guesses
    if guesses is None:
        return
    # A row that has just ended is inactive: its newest token is one after the last known.
    guesses.newest.add_(was_running.to(torch.int64))
    place = guesses.newest.clamp(max=guesses.history.shape[1] - 1)[:, None]
    old = guesses.history.gather(1, place)
    guesses.history.scatter_(1, place, torch.where(was_running[:, None], state.tokens[:, None], old))
