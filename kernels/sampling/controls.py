"""Sampling controls that few requests use: penalties, biases, top-k, min-p, a least length, and the likeliest tokens.

They change the logits x of a row, in float32, before the backend's sampling, in this order:

    repetition   x = x / r if x > 0 else x · r       for tokens in the prompt or generated so far
    presence     x = x - presence                    for generated tokens
    frequency    x = x - frequency · count           for generated tokens
    bias         x = x + bias                        per token
    min tokens   x = -inf                            for stop tokens, before the row's least position
    min-p        x = -inf if x < max x + temperature · log(min_p)
    top-k        x = -inf if x < the k-th largest x

`extras.py` applies them. A step without controls does not run any of it.

The penalties are those of OpenAI's API and of Keskar et al., "CTRL", 2019; min-p is from Nguyen et al., 2024.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.kernels.batch import upload

MAX_TOP_TOKENS = 20  # the most likely tokens that can be asked for, as in OpenAI's API


class RowControls(NamedTuple):
    """The controls of one row. The defaults change nothing."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    min_p: float = 0.0
    top_k: int = 0  # 0: all tokens
    min_position: int = 0  # no stop token before this position
    bias: Mapping[int, float] = {}
    prompt: Sequence[int] = ()  # tokens of the prompt
    generated: Sequence[int] = ()  # tokens generated before the row's newest token


@dataclass(frozen=True)
class LogitControls:
    """The controls of B rows."""

    repetition: Tensor  # (B,) float32, as are the next three
    presence: Tensor
    frequency: Tensor
    min_p: Tensor
    top_k: Tensor  # (B,) int64
    min_position: Tensor  # (B,) int64
    bias: Tensor  # (B, V) float32
    in_prompt: Tensor  # (B, V) bool
    counts: Tensor  # (B, V) int32, of generated tokens

    @classmethod
    def of(cls, n_rows: int, vocab_size: int, device: torch.device) -> "LogitControls":
        """Rows without controls."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            repetition=zeros(n_rows) + 1,
            presence=zeros(n_rows),
            frequency=zeros(n_rows),
            min_p=zeros(n_rows),
            top_k=zeros(n_rows, dtype=torch.int64),
            min_position=zeros(n_rows, dtype=torch.int64),
            bias=zeros(n_rows, vocab_size),
            in_prompt=zeros(n_rows, vocab_size, dtype=torch.bool),
            counts=zeros(n_rows, vocab_size, dtype=torch.int32),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [getattr(self, one.name) for one in fields(self)]

    def first(self, n_rows: int) -> "LogitControls":
        """The first n_rows rows, sharing memory."""
        return LogitControls(*(tensor[:n_rows] for tensor in self.tensors))

    def set_row(self, row: int, controls: RowControls) -> None:
        """Set a row's controls. Does not wait for the device."""
        device = self.bias.device
        numbers = upload(controls[:4], torch.float32, device)
        for at, tensor in enumerate((self.repetition, self.presence, self.frequency, self.min_p)):
            tensor[row] = numbers[at]
        whole = upload(controls[4:6], torch.int64, device)
        self.top_k[row], self.min_position[row] = whole[0], whole[1]
        self.bias[row] = 0
        if controls.bias:
            ids = upload(list(controls.bias), torch.int64, device)
            self.bias[row].index_copy_(0, ids, upload(list(controls.bias.values()), torch.float32, device))
        self.in_prompt[row] = False
        self.in_prompt[row].index_fill_(0, upload(controls.prompt, torch.int64, device), True)
        self.counts[row] = 0
        if controls.generated:
            ids = upload(controls.generated, torch.int64, device)
            self.counts[row].scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))


@dataclass(frozen=True)
class TopTokens:
    """The most likely tokens of the newest steps, as `DecodeState.out_tokens`, in descending order."""

    ids: Tensor  # (steps, B, n) int64
    logprobs: Tensor  # (steps, B, n) float32

    @classmethod
    def of(cls, n_steps: int, n_rows: int, vocab_size: int, device: torch.device) -> "TopTokens":
        """Space for the output."""
        shape = n_steps, n_rows, min(MAX_TOP_TOKENS, vocab_size)
        return cls(
            torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape, dtype=torch.float32, device=device)
        )

    def first(self, n_rows: int) -> "TopTokens":
        """The first n_rows rows, sharing memory."""
        return TopTokens(self.ids[:, :n_rows], self.logprobs[:, :n_rows])
