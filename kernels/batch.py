"""What every op of a forward pass is told: the ragged batch and the sampling parameters.

A call's tokens are flat: N tokens of any number of rows, one after the other, each with its row and its position in
that row. Prefill is many tokens a row, decode is one, a chunk of a long prompt is something between, and all of them
are this one type.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or lists of them, as a tensor on the device, without waiting for what it is busy with."""
    tensor = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


class Workspace:
    """Scratch memory that the ops of a step share. A backend whose ops need some has a kind of its own."""

    def reset(self) -> None:
        """Forget what a call that was broken off left behind."""


class Segment(NamedTuple):
    """The host's view of one row's tokens in the batch."""

    row: int  # the cache row they belong to
    begin: int  # the flat tokens [begin, end) are theirs
    end: int
    keys: int  # cache positions [0, keys) hold everything they may attend to, themselves included


@dataclass(frozen=True)
class RaggedBatch:
    """N tokens of several rows. A row's tokens are adjacent and in order of position."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, each token's place in its row
    rows: Tensor  # (N,) int64, each token's cache row
    segments: tuple[Segment, ...]  # one per row in the batch, in the order of the flat tokens
    exact: bool = True  # the segments' `keys` are the rows' true lengths; False where they only bound them from above
    workspace: Workspace | None = None  # the backend's; an op that needs one and has none makes its own
    _query_blocks: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)  # by size

    @cached_property
    def is_decode_step(self) -> bool:
        """True for a decode step: one token per row, row i being token i."""
        return all(s.row == i and s.begin == i and s.end == i + 1 for i, s in enumerate(self.segments))

    def query_blocks(self, size: int) -> Tensor:
        """The batch's tokens in blocks of at most `size` of one row -> (blocks, 3) int32 on the tokens' device.

        Each is (first token, end token, cache row). Those with most keys come first. Made once for each size.
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
        cls, pieces: Sequence[tuple[int, int, Sequence[int]]], device: torch.device, workspace: Workspace | None = None
    ) -> "RaggedBatch":
        """Build a batch from (row, position of the first token, tokens) for each row."""
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        segments: list[Segment] = []
        for row, start, piece in pieces:
            begin = len(tokens)
            tokens.extend(piece)
            positions.extend(range(start, start + len(piece)))
            rows.extend([row] * len(piece))
            segments.append(Segment(row, begin, len(tokens), start + len(piece)))
        flat = upload([tokens, positions, rows], torch.int64, device)
        return cls(flat[0], flat[1], flat[2], tuple(segments), workspace=workspace)


# Beyond these a draw is what it is there: among the largest logits, or all alike. So 1 / temperature is finite, and
# meets a zero without harm, and no processor that flushes denormals takes a temperature for 0.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-38, 1e37
PER_ROW = ("temperature", "top_p", "seed", "stream", "call")  # of Sampling's fields


@dataclass(frozen=True)
class SamplingTensors:
    """How each of B rows draws its tokens. (seed, stream, call) names a row's random stream."""

    temperature: Tensor  # (B,) float64; 0 takes the most likely token
    top_p: Tensor  # (B,) float64; 0 takes the most likely token, 1 and more keeps the whole vocabulary
    seed: Tensor  # (B,) int64, all 64 bits of it
    stream: Tensor  # (B,) int64 below 2**32
    call: Tensor  # (B,) int64 below 2**32
    greedy: bool  # the host knows that no row draws, so that an eager backend may skip the work

    @classmethod
    def of(
        cls, temperature: float, top_p: float, streams: Sequence[tuple[int, int, int]], device: torch.device
    ) -> "SamplingTensors":
        """The same temperature and top_p for every row, and (seed, stream, call) for each."""
        signed = [[seed - 2**64 if seed >= 2**63 else seed, stream, call] for seed, stream, call in streams]
        seed, stream, call = upload(signed, torch.int64, device).T.contiguous()
        greedy = temperature == 0 or top_p == 0
        kept = temperature and min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)
        full = torch.full((len(streams),), kept, dtype=torch.float64, device=device)
        return cls(full, torch.full_like(full, top_p), seed, stream, call, greedy)

    def first(self, n_rows: int) -> "SamplingTensors":
        """The first rows alone, sharing memory."""
        return replace(self, **{name: getattr(self, name)[:n_rows] for name in PER_ROW})

    def copy_(self, other: "SamplingTensors") -> None:
        """Take another's values, row by row; `greedy` stays."""
        for name in PER_ROW:
            getattr(self, name).copy_(getattr(other, name))
