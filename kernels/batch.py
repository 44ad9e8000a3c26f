"""The inputs of a forward pass: the ragged batch and the sampling parameters.

The tokens of a call are flat: N tokens of any number of rows, one after another, each with its row and its position in
that row. Prefill has many tokens per row, a decode step has one, a chunk of a long prompt has any number. All of them
use the same type.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or lists of numbers, as a tensor on the device. Does not wait for the device's queued work."""
    tensor = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


class Workspace:
    """Scratch memory that the ops of a step share. A backend whose ops need scratch memory has a subclass."""

    def reset(self) -> None:
        """Clean up after an interrupted call."""


class Segment(NamedTuple):
    """One row's tokens in the batch, as the host knows them."""

    row: int  # cache row
    begin: int  # flat tokens [begin, end) belong to it
    end: int
    keys: int  # its tokens attend to cache positions [0, keys) at most; includes the tokens themselves


@dataclass(frozen=True)
class RaggedBatch:
    """N tokens of several rows. A row's tokens are adjacent and in order of position."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, each token's position in its row
    rows: Tensor  # (N,) int64, each token's cache row
    segments: tuple[Segment, ...]  # one per row in the batch, in the order of the flat tokens
    exact: bool = True  # True: the segments' `keys` are the rows' true lengths. False: they are upper bounds
    workspace: Workspace | None = None  # the backend's; an op that needs one and gets None allocates its own
    tokens_per_row: int = 1  # S, of a decode step: more than 1 where it checks guesses
    _query_blocks: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)  # by block size

    @cached_property
    def is_decode_step(self) -> bool:
        """True for a decode step: S tokens per row, and tokens [i·S, (i + 1)·S) belong to row i.

        Where it checks guesses, a row's last tokens may be inactive: their position is negative.
        """
        size = self.tokens_per_row
        return all(s.row == i and s.begin == i * size and s.end == s.begin + size for i, s in enumerate(self.segments))

    def query_blocks(self, size: int) -> Tensor:
        """Split the tokens into blocks of at most `size` tokens of one row -> (blocks, 3) int32 on the tokens' device.

        Each block is (first token, end token, cache row). Blocks with the most keys come first. Cached per size.
        """
        if size not in self._query_blocks:
            blocks = [
                (segment.keys - (segment.end - end), begin, end, segment.row)
                for segment in self.segments
                for begin in range(segment.begin, segment.end, size)
                for end in (min(begin + size, segment.end),)
            ]
            blocks.sort(key=lambda block: -block[0])
            table = upload([block[1:] for block in blocks], torch.int32, self.tokens.device)
            self._query_blocks[size] = table.view(-1, 3)
        return self._query_blocks[size]

    @classmethod
    def of(
        cls, parts: Sequence[tuple[int, int, Sequence[int]]], device: torch.device, workspace: Workspace | None = None
    ) -> "RaggedBatch":
        """Build a batch from (row, position of the first token, tokens) for each row."""
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        segments: list[Segment] = []
        for row, start, new_tokens in parts:
            begin = len(tokens)
            tokens.extend(new_tokens)
            positions.extend(range(start, start + len(new_tokens)))
            rows.extend([row] * len(new_tokens))
            segments.append(Segment(row, begin, len(tokens), start + len(new_tokens)))
        flat = upload([tokens, positions, rows], torch.int64, device)
        return cls(flat[0], flat[1], flat[2], tuple(segments), workspace=workspace)


# Temperatures are clamped to this range. At its ends a draw already selects among the largest logits only, or is
# uniform. The range keeps 1 / temperature finite, so that 0 · inf cannot occur, and keeps temperatures out of the
# denormals, which some processors flush to 0.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-38, 1e37
PER_ROW = ("temperature", "top_p", "seed", "stream", "call")  # fields of SamplingTensors with one value per row


@dataclass(frozen=True)
class SamplingTensors:
    """The sampling parameters of B rows. (seed, stream, call) identifies a row's random stream."""

    temperature: Tensor  # (B,) float64; 0 selects the most likely token
    top_p: Tensor  # (B,) float64; 0 selects the most likely token, 1 and more keep the whole vocabulary
    seed: Tensor  # (B,) int64 that holds the 64 bits of an unsigned seed
    stream: Tensor  # (B,) int64 below 2**32
    call: Tensor  # (B,) int64 below 2**32
    greedy: bool  # True: no row draws, so an eager backend may skip the work

    @classmethod
    def of(
        cls, temperature: float, top_p: float, streams: Sequence[tuple[int, int, int]], device: torch.device
    ) -> "SamplingTensors":
        """The same temperature and top_p for every row, and (seed, stream, call) per row."""
        return cls.per_row([(temperature, top_p)] * len(streams), streams, device)

    @classmethod
    def per_row(
        cls, parameters: Sequence[tuple[float, float]], streams: Sequence[tuple[int, int, int]], device: torch.device
    ) -> "SamplingTensors":
        """(temperature, top_p) and (seed, stream, call) per row."""
        signed = [[seed - 2**64 if seed >= 2**63 else seed, stream, call] for seed, stream, call in streams]
        seed, stream, call = upload(signed, torch.int64, device).view(-1, 3).T.contiguous()
        clamped = [(t and min(max(t, MIN_TEMPERATURE), MAX_TEMPERATURE), top_p) for t, top_p in parameters]
        temperature, top_p = upload(clamped, torch.float64, device).view(-1, 2).T.contiguous()
        greedy = all(t == 0 or top_p == 0 for t, top_p in parameters)
        return cls(temperature, top_p, seed, stream, call, greedy)

    def first(self, n_rows: int) -> "SamplingTensors":
        """The first n_rows rows, sharing memory."""
        return replace(self, **{name: getattr(self, name)[:n_rows] for name in PER_ROW})

    def repeated(self, n_draws: int) -> "SamplingTensors":
        """Each row's parameters for n_draws adjacent draws."""
        return replace(self, **{name: getattr(self, name).repeat_interleave(n_draws) for name in PER_ROW})

    def set_rows(self, rows: Tensor, other: "SamplingTensors") -> None:
        """Set these rows, (n,) int64, to another's n rows; `greedy` is not copied."""
        for name in PER_ROW:
            getattr(self, name).index_copy_(0, rows, getattr(other, name))
