"""Guesses of a row's next tokens, and the tensors that a step needs to check them.

A step that checks k guesses feeds a row its newest token and the guesses: S = k + 1 tokens at once. It draws the token
after each of them, as if nothing had been guessed. A draw depends on the logits, the row's random stream and the
position only. So the draws are those of S single steps, up to and including the first that differs from the guess.
The rest is dropped. The keys and values of dropped tokens stay in the cache, at positions that later steps write
before they read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.kernels.batch import upload

NO_GUESS = -1
MAX_GUESSES = 15  # of a row and step: 16 tokens with the newest
MAX_NGRAM = 3  # tokens that `look_up` tries to find again, falling to 1
DRAFTED = MAX_NGRAM + 1  # in place of the length of an n-gram, for guesses that a draft model drew


@dataclass(frozen=True)
class Guesses:
    """The guesses of B rows, and the tokens that they are made from."""

    history: Tensor  # (B, T) int64, each row's tokens by position, up to its newest; undefined after it
    tokens: Tensor  # (B, MAX_GUESSES) int64, guesses of the tokens after the newest, or NO_GUESS
    matched: Tensor  # (B,) int64, the length of the n-gram that `look_up` found for them, or DRAFTED; 0: no guesses
    newest: Tensor  # (B,) int64, the position of the row's newest token, also after its end

    @classmethod
    def of(cls, n_rows: int, length: int, device: torch.device) -> "Guesses":
        """No guesses, for rows of up to `length` tokens."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(zeros(n_rows, length), zeros(n_rows, MAX_GUESSES) + NO_GUESS, zeros(n_rows), zeros(n_rows))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors; the first dimension of each is the rows."""
        return [getattr(self, field.name) for field in fields(self)]

    def first(self, n_rows: int) -> "Guesses":
        """The first n_rows rows, sharing memory."""
        return Guesses(*(tensor[:n_rows] for tensor in self.tensors))

    def start_rows(self, rows: Tensor, tokens: Tensor, positions: Tensor) -> None:
        """Rows (n,) have these newest tokens and no guesses. `set_history` writes the tokens before."""
        self.history[rows, positions] = tokens
        self.newest[rows] = positions
        self.tokens.index_fill_(0, rows, NO_GUESS)
        self.matched.index_fill_(0, rows, 0)

    def set_history(self, row: int, tokens: Sequence[int]) -> None:
        """Write a row's tokens from position 0 on. Does not wait for the device."""
        self.history[row, : len(tokens)].copy_(upload(tokens, torch.int64, self.history.device))


class Window(NamedTuple):
    """S adjacent tokens of every row, flat: a row's tokens are adjacent."""

    tokens: Tensor  # (B·S,) int64; 0 where inactive
    positions: Tensor  # (B·S,) int64, or INACTIVE
    following: Tensor  # (B·S,) int64, positions + 1
    rows: Tensor  # (B·S,) int64
