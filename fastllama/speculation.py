"""Lossless speculation: steps that check guesses of the next tokens, and where the guesses come from.

A step reads the weights once, for one token or for several. So several tokens are guessed, and one step draws the
token after each of them. `fastllama.kernels.guesses` says why the result is that of single steps.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastllama.kernels.batch import RaggedBatch, Segment
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.guesses import MAX_GUESSES, Window
from fastllama.model import Transformer

MAX_CHECKED_TOKENS = 16  # of all rows together: what the kernels for few tokens take
MAX_CATCH_UP = 256  # tokens that a draft model reads at most after a while without guesses
READ_TOGETHER = 4  # of a row, at a time


class Guesser:
    """Where guesses come from. Whoever needs no more than the state overrides `guess` alone.

    cost: of one guess, as a part of a step without guesses; 0 if guesses are made in every step.
    """

    cost = 0.0

    def prepare(self) -> None:
        """A call begins, or the model's tensors were replaced."""

    def dry_run(self, state: DecodeState) -> None:
        """Compile all kernels of steps of these rows, which are inactive, beside those of `guess`."""

    def follow(self, batch: RaggedBatch) -> None:
        """The model reads these tokens of prompts."""

    def read_cached(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Rows begin with these tokens, which the model does not read, as they are in the cache."""

    def before_step(self, state: DecodeState, n_guesses: int, lengths: Sequence[int]) -> None:
        """A step with so many guesses comes next. lengths: of the rows, at most."""

    def end_row(self) -> None:
        """A row has ended."""

    def leave_out_row(self) -> None:
        """A row is inactive in some steps, so that not all of its tokens are followed."""

    def guess(self, state: DecodeState, n_guesses: int, lengths: Sequence[int] | None) -> None:
        """Guess the tokens after each row's newest one, at least n_guesses, at the end of a step that checked as many.

        lengths: as in `step`, before the step. Can be captured in a graph.
        """
        raise NotImplementedError


class LookupGuesser(Guesser):
    """A row goes on as it did at an earlier place of its prompt or answer. Costs next to nothing, so it always runs."""

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def guess(self, state: DecodeState, n_guesses: int, lengths: Sequence[int] | None) -> None:
        """Guess as many tokens as there is memory for."""
        self._model.ops.look_up(state, MAX_GUESSES)


def most_step_tokens(n_rows: int, n_guesses: int | None) -> int:
    """The most tokens of a decode step of so many rows. n_guesses: of each row; None: as many as pay off."""
    return max(n_rows, MAX_CHECKED_TOKENS) if n_guesses is None else n_rows * (n_guesses + 1)


def window_batch(model: Transformer, window: Window, n_rows: int, keys: Sequence[int] | None) -> RaggedBatch:
    """The tokens of a window as a batch of the model. keys: the positions that each row's tokens attend to, at most."""
    size, longest = window.tokens.shape[0] // n_rows, model.cache.length
    ends = [longest] * n_rows if keys is None else [min(n_keys, longest) for n_keys in keys]
    return RaggedBatch(
        tokens=window.tokens,
        positions=window.positions,
        rows=window.rows,
        segments=tuple(Segment(row, row * size, (row + 1) * size, end) for row, end in enumerate(ends)),
        exact=False,  # steps may be queued whose numbers of tokens are not known
        workspace=model.workspace,
        tokens_per_row=size,
    )


def checked_step(
    model: Transformer, state: DecodeState, guesser: Guesser, n_guesses: int, lengths: Sequence[int] | None
) -> None:
    """Check n_guesses of every row, advance the rows by 1 to n_guesses + 1 tokens, and guess again.

    lengths: as in `step`.
    """
    window = model.ops.window(state, 0, n_guesses + 1)
    keys = None if lengths is None else [length + n_guesses for length in lengths]
    batch = window_batch(model, window, state.rows.shape[0], keys)
    logits = model.logits(model.hidden(batch), batch)
    advance(model, state, guesser, n_guesses, logits, window.following, lengths)


def advance(
    model: Transformer,
    state: DecodeState,
    guesser: Guesser,
    n_guesses: int,
    logits: Tensor,
    following: Tensor,
    lengths: Sequence[int] | None = None,
) -> None:
    """The end of a step: draw from logits (B·S, V) for the positions `following`, accept, and guess again."""
    drawn, logprobs = model.ops.sample(logits, state.sampling, following, model.workspace)
    model.ops.accept(state, drawn, logprobs)
    guesser.guess(state, n_guesses, lengths)


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
