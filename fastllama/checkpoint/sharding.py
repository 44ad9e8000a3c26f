"""The one table of a Llama's weights as files and processes cut them: the axis on which each is split.

Everything that has to know how a checkpoint is cut reads it from here: the readers compare what the files hold with
`weights(params)`, and `read_share` cuts the slice of one process out of however many shards the files have. The two
cuts are independent, so any number of shards loads on any number of processes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastllama.args import ModelArgs

# Split axes under model parallelism, by the last part of a weight's name. Axis 0 is a layer's output (heads, ffn width,
# vocabulary), axis 1 its input, None means that every process holds the whole vector.
SPLIT_AXES = {
    "tok_embeddings": 0,
    "attention_norm": None,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "ffn_norm": None,
    "w1": 0,
    "w3": 0,
    "w2": 1,
    "norm": None,
    "output": 0,
}

EMBEDDING_NAME = "tok_embeddings.weight"
OUTPUT_NAME = "output.weight"
KV_PARTS = ("wk", "wv")


class Piece(Protocol):
    """What one file holds of a weight, read only when narrowed. A torch.Tensor is one."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Stored:
    """A weight as the files hold it: `pieces` that make the whole when joined on `axis`. float64 is read as float32."""

    pieces: tuple[Piece, ...]
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole; `axis` need not be one that the pieces have."""
        shape = list(self.pieces[0].shape)
        if self.axis < len(shape):
            shape[self.axis] = sum(piece.shape[self.axis] for piece in self.pieces)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of what `narrow` returns."""
        stored = self.pieces[0].dtype
        return torch.float32 if stored == torch.float64 else stored

    def narrow(self, axis: int, start: int, length: int) -> torch.Tensor:
        """`length` of the whole's `axis` from `start`: a view of one piece where that holds it, else one new tensor."""
        if axis != self.axis:
            parts = [piece.narrow(axis, start, length) for piece in self.pieces]
        else:
            parts = []
            offset = 0
            for piece in self.pieces:
                size = piece.shape[axis]
                first, last = max(start, offset), min(start + length, offset + size)
                if first < last:
                    parts.append(piece.narrow(axis, first - offset, last - first))
                offset += size
        parts = [part.to(self.dtype) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)


@dataclass(frozen=True)
class Weight:
    """One row of the table. `kv_heads` is the number of heads on axis 0 of wk and wv, else 0."""

    name: str
    shape: tuple[int, ...]
    axis: int | None
    kv_heads: int = 0

    def share(self, rank: int, world_size: int) -> tuple[int, int]:
        """(start, length) of process `rank`'s slice on the split axis; the sizes were checked by `check_split`."""
        if self.axis is None:
            return 0, self.shape[0]
        if self.kv_heads and world_size > self.kv_heads:
            # More processes than kv heads: neighbours share a head, as torch.repeat_interleave would lay them out.
            head_dim = self.shape[0] // self.kv_heads
            return rank * self.kv_heads // world_size * head_dim, head_dim
        length = self.shape[self.axis] // world_size
        return rank * length, length

    def numel(self, rank: int = 0, world_size: int = 1) -> int:
        """Elements in process `rank`'s slice."""
        _, length = self.share(rank, world_size)
        axis = self.axis or 0
        return length * math.prod(self.shape[:axis]) * math.prod(self.shape[axis + 1 :])


def weights(params: Mapping[str, Any]) -> Iterator[Weight]:
    """The table for one model, in the order in which a forward pass needs the weights.

    `params` are resolved ModelArgs fields (n_kv_heads, head_dim, hidden_dim and vocab_size are positive integers).
    """
    args = ModelArgs(**params)
    for name, shape in args.shapes.items():
        part = name.split(".")[-2]
        yield Weight(name, shape, SPLIT_AXES[part], args.n_kv_heads if part in KV_PARTS else 0)


def names(n_layers: int) -> list[str]:
    """The names of `weights`, for when the shapes are not known yet."""
    return list(ModelArgs(n_layers=n_layers).shapes)


def check_split(params: Mapping[str, Any], rank: int, world_size: int) -> None:
    """ValueError unless every split axis divides by `world_size` and `rank` is one of its processes."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size, got rank={rank}, world_size={world_size}")
    ModelArgs(**params).split(world_size)


def read_share(stored: Stored, weight: Weight, rank: int, world_size: int) -> torch.Tensor:
    """Process `rank`'s slice of a weight, on the CPU in the files' dtype.

    Reads only what the slice needs. Where one piece holds all of it the result is a view of the mapped file (possibly
    strided: do not write to it); otherwise it is one new tensor.
    """
    start, length = weight.share(rank, world_size)
    return stored.narrow(weight.axis or 0, start, length)
