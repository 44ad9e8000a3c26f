"""Tensor-parallel sharding of a Llama's weights: the split axis of every weight, and the slice of every rank.

Readers compare the files' contents with `weight_specs(params)`. `read_slice` cuts one rank's slice out of any number of
shards in the files. The two numbers are independent, so any number of shards loads on any number of processes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastllama.args import ModelArgs

# Split axes of matrices under tensor parallelism, by the module's name. Axis 0 is the output dimension (heads, ffn
# width, vocabulary), axis 1 the input dimension. None: every process holds the complete vector. A bias is split like
# the rows of its matrix; if these are not split, every process holds it.
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

BIAS_SUFFIX = ".bias"
KV_PARTS = ("wk", "wv")


class TensorShard(Protocol):
    """The part of a weight that one file holds. `narrow` reads it. torch.Tensor satisfies this protocol."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class ShardedTensor:
    """A weight as the files hold it: `shards` joined on `split_axis` give the complete weight.

    float64 is read as float32.
    """

    shards: tuple[TensorShard, ...]
    split_axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the complete weight. `split_axis` may be an axis that the shards do not have."""
        shape = list(self.shards[0].shape)
        if self.split_axis < len(shape):
            shape[self.split_axis] = sum(shard.shape[self.split_axis] for shard in self.shards)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of what `narrow` returns."""
        stored = self.shards[0].dtype
        return torch.float32 if stored == torch.float64 else stored

    def narrow(self, axis: int, start: int, length: int) -> torch.Tensor:
        """`length` elements from `start` on `axis` of the complete weight.

        The result is a view if one shard holds all of it, else one new tensor.
        """
        if axis != self.split_axis:
            parts = [shard.narrow(axis, start, length) for shard in self.shards]
        else:
            parts = []
            offset = 0
            for shard in self.shards:
                size = shard.shape[axis]
                first, last = max(start, offset), min(start + length, offset + size)
                if first < last:
                    parts.append(shard.narrow(axis, first - offset, last - first))
                offset += size
        parts = [part.to(self.dtype) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.split_axis)


@dataclass(frozen=True)
class WeightSpec:
    """Name, shape and split axis of one weight. `kv_heads` is the number of heads on axis 0 of wk and wv, else 0."""

    name: str
    shape: tuple[int, ...]
    split_axis: int | None
    kv_heads: int = 0

    def slice_of(self, rank: int, world_size: int) -> tuple[int, int]:
        """(start, length) of `rank`'s slice on the split axis. `check_split` must have accepted the sizes."""
        if self.split_axis is None:
            return 0, self.shape[0]
        if self.kv_heads and world_size > self.kv_heads:
            # More processes than kv heads: adjacent ranks share a head, in the order of torch.repeat_interleave.
            head_dim = self.shape[0] // self.kv_heads
            return rank * self.kv_heads // world_size * head_dim, head_dim
        length = self.shape[self.split_axis] // world_size
        return rank * length, length

    def cut(self, rank: int, world_size: int) -> tuple[int, int, int]:
        """(axis, start, length) of `rank`'s slice: the arguments of `narrow`."""
        return self.split_axis or 0, *self.slice_of(rank, world_size)

    def numel(self, rank: int = 0, world_size: int = 1) -> int:
        """Number of elements in `rank`'s slice."""
        _, length = self.slice_of(rank, world_size)
        axis = self.split_axis or 0
        return length * math.prod(self.shape[:axis]) * math.prod(self.shape[axis + 1 :])


def weight_specs(params: Mapping[str, Any]) -> Iterator[WeightSpec]:
    """The specs of all weights of a model, in the order in which a forward pass needs them.

    `params` are resolved ModelArgs fields: n_kv_heads, head_dim, hidden_dim and vocab_size are positive integers.
    """
    args = ModelArgs(**params)
    for name, shape in args.shapes.items():
        part = name.split(".")[-2]
        axis = SPLIT_AXES[part]
        axis = None if axis is not None and axis >= len(shape) else axis
        yield WeightSpec(name, shape, axis, args.n_kv_heads if part in KV_PARTS else 0)


def weight_names(params: Mapping[str, Any]) -> list[str]:
    """The names of `weight_specs`. vocab_size may be unknown."""
    return list(ModelArgs(**params).shapes)


def rename(name: str, outer: Mapping[str, str], prefix: str, inner: Mapping[str, str]) -> str:
    """Meta's name of a weight or bias in another format, whose layers' names begin with `prefix`.

    outer, inner: the other format's names, by Meta's, of the modules outside the layers and in one.
    """
    module, _, kind = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"{prefix}.{layer}.{inner[part]}.{kind}"


def check_split(params: Mapping[str, Any], rank: int, world_size: int) -> None:
    """Raise ValueError unless every split axis divides by `world_size` and 0 <= `rank` < `world_size`."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size, got rank={rank}, world_size={world_size}")
    ModelArgs(**params).split(world_size)


def read_slice(tensor: ShardedTensor, spec: WeightSpec, rank: int, world_size: int) -> torch.Tensor:
    """`rank`'s slice of a weight, on the CPU in the files' dtype. Only the slice is read.

    If one shard holds all of it, the result is a view of the mapped file: it may be strided and must not be written to.
    Otherwise it is one new tensor.
    """
    return tensor.narrow(*spec.cut(rank, world_size))
