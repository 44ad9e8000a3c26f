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

from fastllama.kernels.batch import PER_ROW, SamplingTensors, upload
from fastllama.kernels.guesses import Guesses
from fastllama.kernels.sampling.controls import LogitControls, TopTokens
from fastllama.kernels.sampling.masks import TokenMasks

NO_TOKEN = -1  # returned by `sample` for a row whose logits are not numbers
INACTIVE = -1  # position of a row that generates nothing


@dataclass(frozen=True)
class DecodeState:
    """State of B rows; row i is cache row i. A row's s-th new token goes to `out_tokens[s % steps]`."""

    rows: Tensor  # (B,) int64: 0, 1, …
    tokens: Tensor  # (B,) int64, the newest token of each row, fed in the next step
    positions: Tensor  # (B,) int64, the position of that token, or INACTIVE
    starts: Tensor  # (B,) int64, the position of the row's first generated token
    last: Tensor  # (B,) int64, the last position that may get a token
    is_stop: Tensor  # (B, V) bool, each row's stop tokens
    sampling: SamplingTensors
    out_tokens: Tensor  # (steps, B) int64, the newest steps of each row; undefined after a row's end
    out_logprobs: Tensor  # (steps, B) float32
    controls: LogitControls | None = None  # only where a row needs them
    top: TopTokens | None = None  # only where a row asks for the most likely tokens
    guesses: Guesses | None = None  # only where steps check guesses
    masks: TokenMasks | None = None  # only where a row has a grammar

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
            is_stop=torch.zeros(n_rows, vocab_size, dtype=torch.bool, device=device),
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
            is_stop=self.is_stop[:n_rows],
            sampling=self.sampling.first(n_rows),
            out_tokens=self.out_tokens[:, :n_rows],
            out_logprobs=self.out_logprobs[:, :n_rows],
            controls=self.controls and self.controls.first(n_rows),
            top=self.top and self.top.first(n_rows),
            guesses=self.guesses and self.guesses.first(n_rows),
            masks=self.masks and self.masks.first(n_rows),
        )

    def set(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        last: Sequence[int],
        stop_ids: Sequence[int],
        sampling: SamplingTensors,
    ) -> None:
        """Start the first rows at these newest tokens and positions, and deactivate the other rows.

        Each row generates up to its position `last`. Does not wait for the device.
        """
        n_rows, device = len(tokens), self.tokens.device
        self.deactivate()
        self.start_rows(range(n_rows), tokens, positions, [position + 1 for position in positions], last)
        self.is_stop[:n_rows] = False
        self.is_stop[:n_rows].index_fill_(1, upload(stop_ids, torch.int64, device), True)
        self.sampling.set_rows(self.rows[:n_rows], sampling)

    def start_rows(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        starts: Sequence[int],
        last: Sequence[int],
    ) -> None:
        """Set these rows' newest tokens and positions, first generated positions and last positions."""
        index, tokens_, positions_, starts_, last_ = upload(
            [list(rows), tokens, positions, starts, last], torch.int64, self.tokens.device
        )
        self.tokens[index] = tokens_
        self.positions[index] = torch.where(positions_ < last_, positions_, INACTIVE)
        self.starts[index] = starts_
        self.last[index] = last_
        if self.guesses is not None:
            self.guesses.start_rows(index, tokens_, positions_)

    def set_stops(self, rows: Sequence[int], stop_ids: Sequence[Sequence[int]]) -> None:
        """Set these rows' stop tokens."""
        device = self.tokens.device
        places = [(row, token) for row, ids in zip(rows, stop_ids, strict=True) for token in ids]
        self.is_stop.index_fill_(0, upload(rows, torch.int64, device), False)
        if places:
            index, ids = upload(places, torch.int64, device).T
            # Not `= True`: a value of the host would be copied from memory that is not pinned, which waits.
            self.is_stop.index_put_((index, ids), torch.ones((), dtype=torch.bool, device=device))

    def move_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Let these rows go on at other, inactive rows. Their output so far stays where it is."""
        device = self.tokens.device
        source, target = upload([list(sources), list(targets)], torch.int64, device)
        tensors = [self.tokens, self.positions, self.starts, self.last, self.is_stop]
        tensors += [getattr(self.sampling, name) for name in PER_ROW]
        if self.controls is not None:
            tensors += self.controls.tensors
        if self.guesses is not None:
            tensors += self.guesses.tensors
        if self.masks is not None:
            tensors += self.masks.tensors
        for tensor in tensors:
            tensor.index_copy_(0, target, tensor[source])
        self.positions.index_fill_(0, source, INACTIVE)

    def stop_rows(self, rows: Sequence[int]) -> None:
        """Make these rows inactive."""
        self.positions.index_fill_(0, upload(rows, torch.int64, self.tokens.device), INACTIVE)

    def deactivate(self) -> None:
        """Make every row inactive."""
        self.positions.fill_(INACTIVE)

    def with_extras(self) -> "DecodeState":
        """The same state with memory for controls and for the most likely tokens."""
        (n_rows, vocab_size), device = self.is_stop.shape, self.tokens.device
        top = TopTokens.of(self.out_tokens.shape[0], n_rows, vocab_size, device)
        return replace(self, controls=LogitControls.of(n_rows, vocab_size, device), top=top)

    def with_masks(self) -> "DecodeState":
        """The same state with memory for masks of tokens."""
        n_rows, vocab_size = self.is_stop.shape
        return replace(self, masks=TokenMasks.of(n_rows, vocab_size, self.tokens.device))

    def with_guesses(self, length: int) -> "DecodeState":
        """The same state with memory for guesses, of rows of up to `length` tokens."""
        return replace(self, guesses=Guesses.of(self.rows.shape[0], length, self.tokens.device))

    def with_greedy(self, greedy: bool) -> "DecodeState":
        """The same state with this `greedy` flag, which tells an eager backend whether any row draws."""
        return replace(self, sampling=replace(self.sampling, greedy=greedy))
