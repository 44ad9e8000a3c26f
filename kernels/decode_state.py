"""The static tensors of a decode step: the state of all rows, on the device.

A step feeds each row its newest token and generates the next one. The values in the tensors never affect control flow
in Python, so a step can be captured in a CUDA graph. A row is inactive, at position INACTIVE, once it has met a stop
token, its last position or logits that are not numbers. A step also runs inactive rows: until the next call, such a row
attends to one key, writes no output, and appends nothing that is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastllama.kernels.batch import SamplingTensors, upload

NO_TOKEN = -1  # returned by `sample` for a row whose logits are not numbers
INACTIVE = -1  # position of a row that generates nothing


@dataclass(frozen=True)
class DecodeState:
    """State of B rows; row i is cache row i. A row's s-th new token of a call goes to `out_tokens[s]`."""

    rows: Tensor  # (B,) int64: 0, 1, …
    tokens: Tensor  # (B,) int64, the newest token of each row, fed in the next step
    positions: Tensor  # (B,) int64, the position of that token, or INACTIVE
    starts: Tensor  # (B,) int64, the position of the row's first generated token
    last: Tensor  # (B,) int64, the last position that may get a token
    is_stop: Tensor  # (V,) bool, the stop tokens
    sampling: SamplingTensors
    out_tokens: Tensor  # (steps, B) int64; undefined after a row's end
    out_logprobs: Tensor  # (steps, B) float32

    @classmethod
    def of(cls, n_rows: int, n_steps: int, vocab_size: int, device: torch.device) -> "DecodeState":
        """Inactive rows, with output space for n_steps."""

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
        """The first n_rows rows, sharing memory."""
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
        """Set the first rows to these newest tokens and positions, and deactivate the other rows.

        Each row generates up to its position `last`. Does not wait for the device.
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
        """Make every row inactive."""
        self.positions.fill_(INACTIVE)

    def with_greedy(self, greedy: bool) -> "DecodeState":
        """The same state with this `greedy` flag, which tells an eager backend whether any row draws."""
        return replace(self, sampling=replace(self.sampling, greedy=greedy))
