"""The static tensors of a decode step: all that it knows of its rows, on the device.

A row is fed its newest token, gains the next, and so on; what its tensors hold never decides what Python does. A row
that has met a stop token, its last position or logits that are not numbers is parked: it stands at no position. It is
fed like the others, but appends nothing that is read, attends to one key and writes nothing, until the next call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastllama.kernels.batch import SamplingTensors, upload

NO_TOKEN = -1  # what `sample` gives a row whose logits are not numbers
INACTIVE = -1  # the position of a row that gains nothing


@dataclass(frozen=True)
class DecodeState:
    """B rows; row i is cache row i. Step s of a call writes what the rows gain in it to `out_tokens[s]`."""

    rows: Tensor  # (B,) int64: 0, 1, …
    tokens: Tensor  # (B,) int64, the newest token of each row, next to be fed
    positions: Tensor  # (B,) int64, where it stands, or INACTIVE
    starts: Tensor  # (B,) int64, the position of the first token that the row gains
    last: Tensor  # (B,) int64, the last position that may get a token
    is_stop: Tensor  # (V,) bool, the tokens that end a row
    sampling: SamplingTensors
    out_tokens: Tensor  # (steps, B) int64; of a row that has ended, anything
    out_logprobs: Tensor  # (steps, B) float32

    @classmethod
    def of(cls, n_rows: int, n_steps: int, vocab_size: int, device: torch.device) -> "DecodeState":
        """Parked rows, and room for what they gain in n_steps."""

        def zeros() -> Tensor:
            return torch.zeros(n_rows, dtype=torch.int64, device=device)

        return cls(
            rows=torch.arange(n_rows, device=device),
            tokens=zeros(),
            positions=zeros() + INACTIVE,
            starts=zeros(),
            last=zeros(),
            is_stop=torch.zeros(vocab_size, dtype=torch.bool, device=device),
            sampling=replace(SamplingTensors.of(0.0, 0.0, [(0, 0, 0)] * n_rows, device), greedy=False),
            out_tokens=torch.zeros(n_steps, n_rows, dtype=torch.int64, device=device),
            out_logprobs=torch.zeros(n_steps, n_rows, dtype=torch.float32, device=device),
        )

    def first(self, n_rows: int) -> "DecodeState":
        """The first rows alone, sharing memory."""
        return DecodeState(
            rows=self.rows[:n_rows],
            tokens=self.tokens[:n_rows],
            positions=self.positions[:n_rows],
            starts=self.starts[:n_rows],
            last=self.last[:n_rows],
            is_stop=self.is_stop,
            sampling=self.sampling.first(n_rows),
            out_tokens=self.out_tokens[:, :n_rows],
            out_logprobs=self.out_logprobs[:, :n_rows],
        )

    def set(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        last: Sequence[int],
        stop_ids: Sequence[int],
        sampling: SamplingTensors,
    ) -> None:
        """Stand the first rows on their newest tokens, each to gain more up to position `last`, and park the others.

        Does not wait for the device.
        """
        n_rows, device = len(tokens), self.tokens.device
        self.deactivate()
        new = upload([tokens, positions, last], torch.int64, device)
        self.tokens[:n_rows] = new[0]
        self.positions[:n_rows] = torch.where(new[1] < new[2], new[1], INACTIVE)
        self.starts[:n_rows] = new[1] + 1
        self.last[:n_rows] = new[2]
        self.is_stop.zero_()
        self.is_stop.index_fill_(0, upload(stop_ids, torch.int64, device), True)
        self.sampling.first(n_rows).copy_(sampling)

    def deactivate(self) -> None:
        """Let every row rest."""
        self.positions.fill_(INACTIVE)

    def drawing(self, greedy: bool) -> "DecodeState":
        """The same state, telling an eager backend whether any row draws."""
        return replace(self, sampling=replace(self.sampling, greedy=greedy))
