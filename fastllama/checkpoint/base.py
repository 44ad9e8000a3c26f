"""`Checkpoint`, which every reader returns, and the checks that readers of all layouts share.

Opening reads headers only. `Checkpoint.tensors` yields the weights one by one in Meta's names. They stay in
memory-mapped files until then, so a checkpoint may be far larger than the host's memory.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastllama.args import EMBEDDING_NAME, OUTPUT_NAME
from fastllama.checkpoint.json_config import JsonConfig, short_list
from fastllama.checkpoint.quantized_tensor import QuantizedTensor, cuts_groups, dense
from fastllama.checkpoint.sharding import (
    ShardedTensor,
    WeightSpec,
    check_split,
    weight_specs,
)
from fastllama.kernels.quantized import QuantizedWeight, Weight
from fastllama.quantization import Scheme

logger = logging.getLogger(__name__)

StoredWeight = ShardedTensor | QuantizedTensor
READABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYER_PATTERN = re.compile(r"(?:model\.)?layers\.([0-9]+)\.")
GIT_LFS_SIGNATURE = b"version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: everything known from headers and from the few weights that opening compares.

    path: the folder that holds the weights; it may be `original/` in the given folder.
    format: "meta", "huggingface" or "gguf".
    params: keyword arguments for ModelArgs, all sizes resolved; `rope_scaling_factor` only if the files state it.
    files: the weights' files and their sizes in bytes.
    dtype: the dtype of the matrices when read (norms may be wider): float32 if they are stored in float64. If matrices
        are quantised, that of the embedding.
    stop_token_ids: eos_token_id of generation_config.json or config.json; () for Meta's files and GGUF.
    stored: every weight in the files, by Meta's name, with the adapters merged.
    passed_over: unused weights in the folder (files, or folders with a checkpoint), each with the reason.
    adapters: the folders of the adapters that are merged into the weights.
    bytes_by_type: of a GGUF file, the bytes of the tensors of each type, such as "Q4_1", the largest first. Of a
        quantised folder, the bytes of the weights of each precision, such as "int4 in groups of 128".
    has_embedding_as_output: whether the quantised output has the embedding's bits, in a model that does not tie them
        because the embedding is dequantised.
    """

    path: Path
    format: str
    params: dict[str, Any]
    files: list[tuple[Path, int]]
    dtype: torch.dtype
    stop_token_ids: tuple[int, ...]
    stored: Mapping[str, StoredWeight] = field(repr=False)
    passed_over: tuple[tuple[Path, str], ...] = ()
    adapters: tuple[Path, ...] = ()
    bytes_by_type: Mapping[str, int] = field(default_factory=dict)
    has_embedding_as_output: bool = False

    @property
    def n_parameters(self) -> int:
        """Number of the model's parameters. An output that is the embedding counts once."""
        tied = self.params["tied_output"] or self.has_embedding_as_output
        return sum(spec.numel() for spec in weight_specs(self.params) if not (tied and spec.name == OUTPUT_NAME))

    @property
    def precisions(self) -> tuple[str, ...]:
        """How the matrices are quantised, such as "int4 in groups of 128"; () if none is."""
        quantized = (tensor for tensor in self.stored.values() if isinstance(tensor, QuantizedTensor))
        return tuple(dict.fromkeys(tensor.description for tensor in quantized))

    def schemes(self, world_size: int = 1) -> dict[str, Scheme]:
        """How the weights that are quantised in the files are quantised when `world_size` processes read them, by name.

        A weight whose groups of columns the processes' slices would cut is not among them: it is dequantised.
        """
        pairs = ((spec, self.stored.get(spec.name)) for spec in weight_specs(self.params))
        return {
            spec.name: tensor.scheme
            for spec, tensor in pairs
            if isinstance(tensor, QuantizedTensor) and not cuts_groups(tensor, spec, world_size)
        }

    def tensors(self, rank: int = 0, world_size: int = 1, progress: bool | None = None) -> Iterator[tuple[str, Weight]]:
        """(name, slice) of every weight for process `rank` of `world_size`, in the order of a forward pass.

        Slices are CPU tensors in the files' dtype, and QuantizedWeights in the order PLAIN of what the files hold
        quantised. If one shard holds all of a slice, it is a view of the mapped file:
        it may be strided and must not be written to. Otherwise it is one new tensor. The iterator keeps no tensor, so
        host memory stays near one tensor if the caller also releases each before it takes the next. May be called more
        than once.
        With more processes than kv heads, adjacent ranks receive the same head of wk and wv.

        progress: None shows a bar if stderr is a terminal, True always, False never.
        Raises ValueError at the call, before anything is read, if the sizes do not divide by `world_size`.
        """
        check_split(self.params, rank, world_size)
        if cut := sorted(self.schemes(1).keys() - self.schemes(world_size).keys()):
            logger.warning(
                "%s: %s of %d processes would cut groups of quantised columns, so these weights are dequantised",
                self.path,
                short_list(cut),
                world_size,
            )
        return self._read(rank, world_size, progress)

    def dense_tensors(
        self, rank: int = 0, world_size: int = 1, progress: bool | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of `tensors`, with the quantised ones dequantised to float32."""
        return map(_dequantized, self.tensors(rank, world_size, progress))

    def _read(self, rank: int, world_size: int, progress: bool | None) -> Iterator[tuple[str, Weight]]:
        table = [(spec, self._stored_tensor(spec, world_size)) for spec in weight_specs(self.params)]
        sizes = [_slice_bytes(tensor, spec, rank, world_size) for spec, tensor in table]
        hidden = None if progress is None else not progress
        with tqdm(
            total=sum(sizes), desc="loading", unit="B", unit_scale=True, unit_divisor=1024, disable=hidden
        ) as bar:
            for (spec, tensor), size in zip(table, sizes, strict=True):
                yield spec.name, tensor.narrow(*spec.cut(rank, world_size))
                bar.update(size)

    def _stored_tensor(self, spec: WeightSpec, world_size: int) -> StoredWeight:
        tied = self.params["tied_output"] and spec.name == OUTPUT_NAME
        tensor = self.stored[EMBEDDING_NAME if tied else spec.name]
        is_cut = isinstance(tensor, QuantizedTensor) and cuts_groups(tensor, spec, world_size)
        return dense(tensor) if is_cut else tensor


def _dequantized(named: tuple[str, Weight]) -> tuple[str, torch.Tensor]:
    name, weight = named
    return name, weight.dequantized() if isinstance(weight, QuantizedWeight) else weight


def _slice_bytes(tensor: StoredWeight, spec: WeightSpec, rank: int, world_size: int) -> int:
    """Bytes of a process's slice as it is read."""
    n_elements = spec.numel(rank, world_size)
    if isinstance(tensor, QuantizedTensor):
        return tensor.n_bytes * n_elements // spec.numel()
    return n_elements * tensor.shards[0].dtype.itemsize


def check_dims(config: JsonConfig, params: Mapping[str, Any]) -> None:
    """Raise ValueError unless the head counts and head_dim in `params`, resolved from `config`, are valid."""
    if params["n_heads"] % params["n_kv_heads"]:
        raise ValueError(
            f"{config.path}: expected n_heads to be a multiple of n_kv_heads, "
            f"got n_heads={params['n_heads']}, n_kv_heads={params['n_kv_heads']}"
        )
    if params["head_dim"] % 2:
        raise ValueError(f"{config.path}: rotary embedding needs an even head_dim, got {params['head_dim']}")


def read_head_dim(config: JsonConfig, dim: int, n_heads: int) -> int:
    """The stated head_dim, else dim / n_heads. ValueError if that is not an integer."""
    if not config.has("head_dim") and dim % n_heads:
        raise ValueError(
            f"{config.path}: expected the width to be a multiple of the number of heads, got {dim} and {n_heads} heads"
        )
    return config.integer("head_dim", default=dim // n_heads)


def check_names(source: Path, expected: Collection[str], found: Collection[str], hint: str = "") -> None:
    """Raise ValueError if tensors are missing or unexpected. The message lists them; `hint` is a possible cause."""
    known, present = set(expected), set(found)
    missing = [name for name in expected if name not in present]
    unexpected = [name for name in found if name not in known]
    if missing or unexpected:
        complaints = [f"{len(missing)} missing: {short_list(missing)}"] if missing else []
        complaints += [f"{len(unexpected)} unexpected: {short_list(unexpected)}"] if unexpected else []
        complaints += [hint] if hint else []
        raise ValueError(f"{source}: the tensors do not match this Llama; {'; '.join(complaints)}")


def count_layers(names: Collection[str]) -> int:
    """The number of different layers in the names of tensors."""
    return len({match[1] for name in names if (match := LAYER_PATTERN.match(name))})


def check_dtypes(source: Path, dtypes: Mapping[str, str]) -> None:
    """Raise ValueError that lists tensors whose dtype, named as in torch, is not in READABLE_DTYPES."""
    readable = [dtype_name(dtype) for dtype in READABLE_DTYPES]
    wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in readable]
    if wrong:
        raise ValueError(
            f"{source}: expected {', '.join(readable)}, got {short_list(wrong)}; "
            "quantised weights that config.json does not describe, and other converted ones, are not supported: use "
            "the original ones"
        )


def check_shapes(source: Path, rule: str, shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> None:
    """Raise ValueError that lists tensors whose (expected, found) shapes differ.

    `rule` is the part of the message after "the shape that", such as "config.json requires".
    """
    wrong = [
        f"{name}: expected {tuple(expected)}, got {tuple(found)}"
        for name, (expected, found) in shapes.items()
        if tuple(expected) != tuple(found)
    ]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors do not have the shape that {rule}; {short_list(wrong)}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_first_bytes(path: Path) -> bytes:
    """The first bytes of a weights file. ValueError if it is empty, unreadable or a git-lfs pointer.

    ValueError also if its path is not UTF-8: torch and safetensors cannot map such a file.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # torch's own message would say that the file is damaged
        raise ValueError(
            f"{str(path)!r}: expected a path in UTF-8, as torch and safetensors need it to map a file; "
            "rename the folder or the file"
        ) from error
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS_SIGNATURE))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not start:
        raise ValueError(f"{path}: is empty; download it again")
    if start == GIT_LFS_SIGNATURE:
        raise ValueError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    return start


def file_sizes(paths: Collection[Path]) -> list[tuple[Path, int]]:
    return [(path, path.stat().st_size) for path in paths]
