"""The speed of light: the least time that a model's launches can take on a machine, from bytes and flops alone.

Bytes are those that have to come from memory: every weight that a launch multiplies by, its norm's scales, the rows of
the embedding, and the cached keys and values. What one launch leaves for the next stays in a cache and counts nothing.
Flops are two for each multiply and add of a matrix product and of attention. A launch takes at least the longer of what
memory needs for its bytes and the matrix units for its flops; a step at least the sum of its launches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastllama.args import ModelArgs


@dataclass(frozen=True)
class Machine:
    """The two rates that bound everything."""

    read: float  # bytes a second that it reads from memory
    matmul: float  # flops a second of large matrix products in the model dtype

    def __post_init__(self) -> None:
        for name, rate in (("read", self.read), ("matmul", self.matmul)):
            if not rate > 0:
                raise ValueError(f"a machine's {name} rate must be positive, got {rate}")


@dataclass(frozen=True)
class Links:
    """What connects the processes that share a model."""

    bandwidth: float  # bytes a second that each sends, and receives
    latency: float  # seconds of a collective on next to nothing


class DataSheet(NamedTuple):
    """A GPU as its maker describes it: what `inspect` plans with, where nothing has been measured."""

    machine: Machine  # matmul is dense bfloat16
    link_bandwidth: float
    memory: float  # bytes


# NVIDIA's data sheets, of the SXM boards; links are NVLink's, one direction.
DATA_SHEETS = {
    "A100": DataSheet(Machine(read=2.039e12, matmul=312e12), 300e9, 80e9),
    "H100": DataSheet(Machine(read=3.35e12, matmul=989e12), 450e9, 80e9),
    "H200": DataSheet(Machine(read=4.8e12, matmul=989e12), 450e9, 141e9),
    "B200": DataSheet(Machine(read=8e12, matmul=2250e12), 900e9, 180e9),
}
COLLECTIVE_LATENCY_S = 10e-6  # assumed, within one machine


@dataclass(frozen=True)
class Work:
    """One kind of launch."""

    name: str
    count: int  # how many there are
    bytes: float  # of each
    flops: float

    def least_seconds(self, machine: Machine) -> float:
        """Of one launch."""
        return max(self.bytes / machine.read, self.flops / machine.matmul)


def decode_step(args: ModelArgs, dtype: torch.dtype, batch: int, context: float) -> list[Work]:
    """The launches of a decode step, in order: one token for each of `batch` rows, over `context` positions a row."""
    attended = batch * context
    return [
        Work("embed", 1, batch * args.dim * dtype.itemsize, 0),
        *_layers(args, dtype, batch, attended, attended),
        _head(args, dtype, batch),
        Work("sampling", 2, 0, 0),
    ]


def prefill(args: ModelArgs, dtype: torch.dtype, lengths: Sequence[int]) -> list[Work]:
    """The work of a prefill of prompts of these lengths, op by op: each attends to itself, causally."""
    n_tokens, attended = sum(lengths), sum(length * (length + 1) / 2 for length in lengths)
    return [
        Work("embed", 1, n_tokens * args.dim * dtype.itemsize, 0),
        *_layers(args, dtype, n_tokens, n_tokens, attended),
        _head(args, dtype, len(lengths)),
    ]


def collectives_seconds(args: ModelArgs, dtype: torch.dtype, batch: int, n_processes: int, links: Links) -> float:
    """The least time of what `n_processes` that share a model exchange in a decode step.

    A sum behind the embedding and two in each layer, (batch, dim) each, which a ring sends twice but for one process's
    part; and the logits, gathered.
    """
    if n_processes == 1:
        return 0.0
    others = (n_processes - 1) / n_processes
    rows, logits = (batch * width * dtype.itemsize for width in (args.dim, args.vocab_size))
    of_sum = links.latency + 2 * others * rows / links.bandwidth
    return (2 * args.n_layers + 1) * of_sum + links.latency + others * logits / links.bandwidth


def least_seconds(work: Iterable[Work], machine: Machine) -> float:
    """Of all launches together."""
    return sum(one.count * one.least_seconds(machine) for one in work)


def total_bytes(work: Iterable[Work]) -> float:
    """Of all launches together."""
    return sum(one.count * one.bytes for one in work)


def total_flops(work: Iterable[Work]) -> float:
    """Of all launches together."""
    return sum(one.count * one.flops for one in work)


def _layers(args: ModelArgs, dtype: torch.dtype, n_tokens: int, cached: float, attended: float) -> list[Work]:
    """The five launches of a layer. cached: positions that are read. attended: those that tokens attend to, in all."""
    heads, kv_width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim

    def projection(name: str, out_features: int, in_features: int, scales: int) -> Work:
        elements = out_features * in_features
        return Work(name, args.n_layers, (elements + scales) * dtype.itemsize, 2 * n_tokens * elements)

    return [
        projection("qkv", heads + 2 * kv_width, args.dim, args.dim),
        Work("attention", args.n_layers, 2 * kv_width * cached * dtype.itemsize, 4 * heads * attended),
        projection("output", args.dim, heads, 0),
        projection("gate+up", 2 * args.hidden_dim, args.dim, args.dim),
        projection("down", args.dim, args.hidden_dim, 0),
    ]


def _head(args: ModelArgs, dtype: torch.dtype, n_rows: int) -> Work:
    elements = args.vocab_size * args.dim
    return Work("head", 1, (elements + args.dim) * dtype.itemsize, 2 * n_rows * elements)
