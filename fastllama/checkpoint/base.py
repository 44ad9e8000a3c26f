"""What every reader makes: a `Checkpoint`, and the strict checks that come before one exists.

Opening reads headers only. The weights stay in the mapped files until `Checkpoint.tensors` hands them out one by one,
in Meta's names, so that a model can be filled from a checkpoint far larger than the host's memory.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastllama.checkpoint.json_config import JsonConfig, listing
from fastllama.checkpoint.sharding import EMBEDDING_NAME, OUTPUT_NAME, Stored, Weight, check_split, read_share, weights

READABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYER = re.compile(r"(?:model\.)?layers\.([0-9]+)\.")
GIT_LFS_SIGNATURE = b"version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: everything known without reading the weights (but for those that must agree).

    path: the folder that holds the weights (it may be `original/` below the one asked for).
    format: "meta" or "huggingface".
    params: keyword arguments for ModelArgs, all sizes resolved; `rope_scaling_factor` only where the files say it.
    files: the weights' files and their sizes in bytes.
    dtype: of the stored matrices (norms may be stored wider); float32 for float64, which is read as that.
    stop_token_ids: what generation_config.json or config.json call eos_token_id; () for Meta's files.
    passed_over: weights that lie there, too, and were not taken: files, or folders with a checkpoint, and why.
    """

    path: Path
    format: str
    params: dict[str, Any]
    files: list[tuple[Path, int]]
    dtype: torch.dtype
    stop_token_ids: tuple[int, ...]
    stored: Mapping[str, Stored] = field(repr=False)
    passed_over: tuple[tuple[Path, str], ...] = ()

    @property
    def n_parameters(self) -> int:
        """Parameters of the model; a tied output counts once, with the embedding."""
        tied = self.params["tied_output"]
        return sum(weight.numel() for weight in weights(self.params) if not (tied and weight.name == OUTPUT_NAME))

    def tensors(
        self, rank: int = 0, world_size: int = 1, progress: bool | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, slice) of every weight for process `rank` of `world_size`, in the order of a forward pass.

        Slices are CPU tensors in the files' dtype: a view of the mapped file where one shard holds all of it (possibly
        strided; never write to it), else one new tensor. Nothing is kept between steps, so host memory stays near one
        tensor as long as the consumer, too, lets go of each before it asks for the next. May be called again.
        With more processes than kv heads, neighbouring processes receive the same head of wk and wv.

        progress: None shows a bar on stderr where that is a terminal, True always, False never.
        Raises ValueError at the call, before anything is read, where the sizes do not divide by `world_size`.
        """
        check_split(self.params, rank, world_size)
        return self._read(rank, world_size, progress)

    def _read(self, rank: int, world_size: int, progress: bool | None) -> Iterator[tuple[str, torch.Tensor]]:
        table = [(weight, self._source(weight)) for weight in weights(self.params)]
        sizes = [weight.numel(rank, world_size) * stored.pieces[0].dtype.itemsize for weight, stored in table]
        hidden = None if progress is None else not progress
        with tqdm(
            total=sum(sizes), desc="loading", unit="B", unit_scale=True, unit_divisor=1024, disable=hidden
        ) as bar:
            for (weight, stored), size in zip(table, sizes, strict=True):
                yield weight.name, read_share(stored, weight, rank, world_size)
                bar.update(size)

    def _source(self, weight: Weight) -> Stored:
        tied = self.params["tied_output"] and weight.name == OUTPUT_NAME
        return self.stored[EMBEDDING_NAME if tied else weight.name]


def check_dims(fields: JsonConfig, params: Mapping[str, Any]) -> None:
    """ValueError unless the heads of resolved `params` fit each other; `fields` is the file they came from."""
    if params["n_heads"] % params["n_kv_heads"]:
        raise ValueError(
            f"{fields.path}: expected n_heads to be a multiple of n_kv_heads, "
            f"got n_heads={params['n_heads']}, n_kv_heads={params['n_kv_heads']}"
        )
    if params["head_dim"] % 2:
        raise ValueError(f"{fields.path}: rotary embedding needs an even head_dim, got {params['head_dim']}")


def head_dim_of(fields: JsonConfig, dim: int, n_heads: int) -> int:
    """The stated head_dim, else dim / n_heads; ValueError where that is no integer."""
    if not fields.has("head_dim") and dim % n_heads:
        raise ValueError(
            f"{fields.path}: expected the width to be a multiple of the number of heads, got {dim} and {n_heads} heads"
        )
    return fields.integer("head_dim", default=dim // n_heads)


def check_names(source: Path, expected: Collection[str], found: Collection[str], hint: str = "") -> None:
    """ValueError that lists the missing and the unexpected tensors, if any; `hint` says what may be behind it."""
    known, present = set(expected), set(found)
    missing = [name for name in expected if name not in present]
    unexpected = [name for name in found if name not in known]
    if missing or unexpected:
        complaints = [f"{len(missing)} missing: {listing(missing)}"] if missing else []
        complaints += [f"{len(unexpected)} unexpected: {listing(unexpected)}"] if unexpected else []
        complaints += [hint] if hint else []
        raise ValueError(f"{source}: the tensors are not those of this Llama; {'; '.join(complaints)}")


def count_layers(names: Collection[str]) -> int:
    """How many layers the names of tensors speak of."""
    return len({match[1] for name in names if (match := LAYER.match(name))})


def check_dtypes(source: Path, found: Mapping[str, str]) -> None:
    """ValueError that lists tensors whose dtype (named as torch names it) is not a plain floating one."""
    readable = [dtype_name(dtype) for dtype in READABLE_DTYPES]
    wrong = [f"{name} ({dtype})" for name, dtype in found.items() if dtype not in readable]
    if wrong:
        raise ValueError(
            f"{source}: expected {', '.join(readable)}, got {listing(wrong)}; "
            "quantised and other converted weights are not supported: use the original ones"
        )


def check_shapes(source: Path, rule: str, shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> None:
    """ValueError that lists the tensors whose (expected, found) shapes differ; `rule` is where the sizes come from."""
    wrong = [
        f"{name}: expected {tuple(expected)}, got {tuple(found)}"
        for name, (expected, found) in shapes.items()
        if tuple(expected) != tuple(found)
    ]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors do not have the shape that {rule}; {listing(wrong)}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_start(path: Path) -> bytes:
    """The first bytes of a weights file; ValueError where it is empty, unreadable or a git-lfs pointer.

    ValueError, too, where its path is not UTF-8: torch and safetensors cannot be told to map it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # its message would blame the file
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
