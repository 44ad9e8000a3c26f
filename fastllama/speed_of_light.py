"""The speed of light: the least time of a model's launches on a machine, from bytes and flops alone.

Bytes are those read from memory: the weights of each launch, its norm's scales, the rows of the embedding, and the
cached keys and values. Activations between launches stay in a cache and are not counted. A multiply-add of a matrix
product or of attention is two flops. A launch takes at least the longer of the time to read its bytes and the time to
compute its flops. A step takes at least the sum of its launches, and of the gaps between them where these are given.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastllama.args import OUTPUT_NAME, ModelArgs
from fastllama.quantization import NOTHING_QUANTIZED, Scheme, bytes_of

# Meta's names of the weights that a launch of a layer reads.
OP_WEIGHTS = {
    "qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "output": ("attention.wo",),
    "gate+up": ("feed_forward.w1", "feed_forward.w3"),
    "down": ("feed_forward.w2",),
}


@dataclass(frozen=True)
class Machine:
    """A machine's memory bandwidth and matrix throughput."""

    read: float  # bytes read from memory per second
    matmul: float  # flops per second of large matrix products in the model dtype

    def __post_init__(self) -> None:
        for name, rate in (("read", self.read), ("matmul", self.matmul)):
            if not rate > 0:
                raise ValueError(f"a machine's {name} rate must be positive, got {rate}")


@dataclass(frozen=True)
class Links:
    """The links between the processes that share a model."""

    bandwidth: float  # bytes per second that each process sends, and receives
    latency: float  # seconds of a collective on almost no data


class DataSheet(NamedTuple):
    """A GPU's figures from its maker's data sheet. `inspect` plans with them, as it measures nothing."""

    machine: Machine  # matmul is dense bfloat16
    link_bandwidth: float
    memory: float  # bytes


# From NVIDIA's data sheets of the SXM boards; link bandwidth is NVLink's in one direction.
DATA_SHEETS = {
    "A100": DataSheet(Machine(read=2.039e12, matmul=312e12), 300e9, 80e9),
    "H100": DataSheet(Machine(read=3.35e12, matmul=989e12), 450e9, 80e9),
    "H200": DataSheet(Machine(read=4.8e12, matmul=989e12), 450e9, 141e9),
    "B200": DataSheet(Machine(read=8e12, matmul=2250e12), 900e9, 180e9),
}
COLLECTIVE_LATENCY_S = 10e-6  # an assumption, for processes on one machine
# An assumption, for launches of one CUDA graph: the last programs of one end, and the first loads of the next arrive.
LAUNCH_GAP_S = 2.5e-6


@dataclass(frozen=True)
class Work:
    """Launches of one kind."""

    name: str
    count: int
    bytes: float  # of one launch
    flops: float  # of one launch

    def least_seconds(self, machine: Machine) -> float:
        """The least time of one launch."""
        return max(self.bytes / machine.read, self.flops / machine.matmul)


def decode_step(
    args: ModelArgs,
    dtype: torch.dtype,
    batch: int,
    context: float,
    schemes: Mapping[str, Scheme] = NOTHING_QUANTIZED,
    tokens_per_row: int = 1,
) -> list[Work]:
    """The launches of a decode step, in order, for `batch` rows with `context` cached positions.

    schemes: how weights are quantised, by name (`fastllama.quantization.model_schemes`). tokens_per_row: the newest
    token, and guesses. They share the weights, and a row's keys and values; each has its own flops, logits and draw.
    The launches that only a step with guesses has are in `speculation_limits`. Raises ValueError for fewer than one.
    """
    if tokens_per_row < 1:
        raise ValueError(f"a decode step has at least 1 token per row, got {tokens_per_row}")
    n_tokens, cached = batch * tokens_per_row, batch * context
    return [
        Work("embed", 1, n_tokens * args.dim * dtype.itemsize, 0),
        *_layers(args, dtype, n_tokens, cached, cached * tokens_per_row, schemes),
        _head(args, dtype, n_tokens, schemes),
        Work("sampling", 2, 0, 0),
    ]


def prefill(args: ModelArgs, dtype: torch.dtype, lengths: Sequence[int]) -> list[Work]:
    """The work of a prefill of prompts of these lengths, op by op, with causal attention within each prompt."""
    n_tokens, attended = sum(lengths), sum(length * (length + 1) / 2 for length in lengths)
    return [
        Work("embed", 1, n_tokens * args.dim * dtype.itemsize, 0),
        *_layers(args, dtype, n_tokens, n_tokens, attended, NOTHING_QUANTIZED),
        _head(args, dtype, len(lengths), NOTHING_QUANTIZED),
    ]


def collectives_seconds(args: ModelArgs, dtype: torch.dtype, batch: int, n_processes: int, links: Links) -> float:
    """The least time of the collectives of a decode step, in seconds, for `n_processes` that share a model.

    They are an all-reduce of (batch, dim) after the embedding, two of them in each layer, and an all-gather of the
    logits. A ring all-reduce sends the data twice, less one process's part each time.
    """
    if n_processes == 1:
        return 0.0
    other_share = (n_processes - 1) / n_processes
    rows, logits = (batch * width * dtype.itemsize for width in (args.dim, args.vocab_size))
    all_reduce = links.latency + 2 * other_share * rows / links.bandwidth
    return (2 * args.n_layers + 1) * all_reduce + links.latency + other_share * logits / links.bandwidth


def least_seconds(work: Iterable[Work], machine: Machine, launch_gap: float = 0.0) -> float:
    """The least time of all launches together. launch_gap: seconds from the end of a launch to the next one's work."""
    return sum(one.count * (one.least_seconds(machine) + launch_gap) for one in work)


def total_bytes(work: Iterable[Work]) -> float:
    """The bytes of all launches together."""
    return sum(one.count * one.bytes for one in work)


def total_flops(work: Iterable[Work]) -> float:
    """The flops of all launches together."""
    return sum(one.count * one.flops for one in work)


def _layers(
    args: ModelArgs, dtype: torch.dtype, n_tokens: int, cached: float, attended: float, schemes: Mapping[str, Scheme]
) -> list[Work]:
    """The five launches of a layer. cached: positions read. attended: positions attended to, summed over tokens."""
    heads, kv_width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim

    def projection(op: str, out_features: int, in_features: int, scales: int) -> Work:
        names = [f"layers.{layer}.{name}.weight" for layer in range(args.n_layers) for name in OP_WEIGHTS[op]]
        n_bytes = _bytes_of_all(names, args, dtype, schemes) / args.n_layers + scales * dtype.itemsize
        return Work(op, args.n_layers, n_bytes, 2 * n_tokens * out_features * in_features)

    return [
        projection("qkv", heads + 2 * kv_width, args.dim, args.dim),
        Work("attention", args.n_layers, 2 * kv_width * cached * dtype.itemsize, 4 * heads * attended),
        projection("output", args.dim, heads, 0),
        projection("gate+up", 2 * args.hidden_dim, args.dim, args.dim),
        projection("down", args.dim, args.hidden_dim, 0),
    ]


def _head(args: ModelArgs, dtype: torch.dtype, n_rows: int, schemes: Mapping[str, Scheme]) -> Work:
    n_bytes = _bytes_of_all([OUTPUT_NAME], args, dtype, schemes) + args.dim * dtype.itemsize
    return Work("head", 1, n_bytes, 2 * n_rows * args.vocab_size * args.dim)


def _bytes_of_all(names: Iterable[str], args: ModelArgs, dtype: torch.dtype, schemes: Mapping[str, Scheme]) -> float:
    """The bytes of matrices, given by Meta's names, with the scales of those that are quantised."""
    shapes = args.shapes
    return sum(
        bytes_of(schemes[name], shapes[name]) if name in schemes else math.prod(shapes[name]) * dtype.itemsize
        for name in names
    )
