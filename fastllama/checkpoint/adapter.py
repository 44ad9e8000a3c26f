"""Merges LoRA adapters (PEFT's folders) into a checkpoint's weights while they are read.

W' = W + scale · B·A, computed in float32 and rounded once to the stored dtype; the terms of several adapters are added
in order. `MergedTensor` computes only the slice that a process reads, CHUNK_BYTES at a time, so host memory stays near
one tensor on any number of processes, or near two where a slice is joined from several shards.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastllama.args import EMBEDDING_NAME, OUTPUT_NAME
from fastllama.checkpoint.adapter_config import AdapterConfig
from fastllama.checkpoint.adapter_files import EMBEDDING_MODULE, AdapterTensors, check_folder, read_tensors
from fastllama.checkpoint.base import Checkpoint, check_shapes
from fastllama.checkpoint.consistency import same_values
from fastllama.checkpoint.huggingface import PERMUTED_PARTS, huggingface_names
from fastllama.checkpoint.json_config import short_list
from fastllama.checkpoint.quantized_tensor import QuantizedTensor, dense
from fastllama.checkpoint.safetensors_files import BASE_PREFIX, SafetensorsTensor
from fastllama.checkpoint.sharding import ShardedTensor, weight_specs
from fastllama.checkpoint.unsupported_formats import MERGE_WITH_PEFT
from fastllama.torch_settings import with_default_settings

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**21


@dataclass(frozen=True)
class LowRankUpdate:
    """scale · B·A for one weight: B (O, r), A (r, I). An embedding's is transposed: (B·A)ᵀ, with B (dim, r), A (r, V).

    If B's rows are q's or k's, `b.head_dim` is set, and they are read in Meta's order.
    """

    scale: float
    a: SafetensorsTensor
    b: SafetensorsTensor
    transposed: bool

    def factors(self, axis: int, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (rows, r) and (r, columns) whose product is the update of a weight's slice, before scaling."""
        rows, columns = (self.a, self.b) if self.transposed else (self.b, self.a)
        rows_axis, columns_axis = (1, 0) if self.transposed else (0, 1)
        left = _read(rows, rows_axis, (start, length) if axis == 0 else None)
        right = _read(columns, columns_axis, (start, length) if axis == 1 else None)
        return (left.T, right.T) if self.transposed else (left, right)


def _read(tensor: SafetensorsTensor, axis: int, part: tuple[int, int] | None) -> torch.Tensor:
    start, length = part or (0, tensor.shape[axis])
    return tensor.narrow(axis, start, length).float()


class MergedTensor:
    """A weight with its updates, as one shard. `narrow` reads and merges only the slice."""

    def __init__(self, base: ShardedTensor, updates: Sequence[LowRankUpdate]) -> None:
        self._base = base
        self._updates = updates
        self.shape = base.shape
        self.dtype = base.dtype

    @with_default_settings
    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """`length` elements from `start` on axis `dim` of the merged weight, as one new tensor."""
        base = self._base.narrow(dim, start, length)
        terms = [(update.scale, *update.factors(dim, start, length)) for update in self._updates]
        merged = torch.empty(base.shape, dtype=self.dtype)
        step = max(1, CHUNK_BYTES // (base.shape[1] * torch.float32.itemsize))
        for first in range(0, base.shape[0], step):
            rows = slice(first, first + step)
            total = base[rows].float()
            for scale, left, right in terms:
                total = torch.addmm(total, left[rows], right, alpha=scale)
            merged[rows] = total
        return merged


def merge_adapters(checkpoint: Checkpoint, folders: Sequence[Path]) -> Checkpoint:
    """The checkpoint with the adapters in `folders`, whose weights are merged when they are read.

    An adapter of the embedding or of the output unties a tied output. ValueError if an adapter is damaged, was trained
    on another base, or is one that cannot be merged.
    """
    stored, params = dict(checkpoint.stored), dict(checkpoint.params)
    updates: dict[str, list[LowRankUpdate]] = {}
    for folder in folders:
        for name, update in _read_updates(folder, checkpoint).items():
            updates.setdefault(name, []).append(update)
    if params["tied_output"] and not updates.keys().isdisjoint((EMBEDDING_NAME, OUTPUT_NAME)):
        logger.info("%s: an adapter changes the embedding or the output, which are no longer tied", checkpoint.path)
        stored[OUTPUT_NAME] = stored[EMBEDDING_NAME]
        params["tied_output"] = False
    if any(isinstance(stored[name], QuantizedTensor) for name in updates):
        logger.info("%s: the weights that an adapter changes are dequantised", checkpoint.path)
    for name, several in updates.items():
        stored[name] = ShardedTensor((MergedTensor(dense(stored[name]), several),))
    return replace(checkpoint, params=params, stored=stored, adapters=(*checkpoint.adapters, *folders))


def _read_updates(folder: Path, checkpoint: Checkpoint) -> dict[str, LowRankUpdate]:
    """The updates of one adapter, by Meta's name of the weight. Reads headers, and complete copies of weights."""
    check_folder(folder)
    config = AdapterConfig.read(folder, checkpoint.params["n_layers"])
    matrices = [spec.name for spec in weight_specs(checkpoint.params) if len(spec.shape) > 1]
    modules = {name.removesuffix(".weight"): meta for meta, name in huggingface_names(matrices).items()}
    full_names = {module.removeprefix(BASE_PREFIX): module for module in modules}
    tensors = read_tensors(folder, full_names)
    present = [full_names[module] for module in tensors.factors]
    if missing := config.missing_targets(modules, present):
        raise ValueError(
            f"{tensors.path}: holds no tensors of {len(missing)} modules in target_modules: {short_list(missing)}; "
            "download it again, or correct adapter_config.json"
        )
    _check_shapes(tensors, full_names, modules, config, checkpoint)
    _check_copies(tensors, full_names, modules, checkpoint)
    updates = {}
    for short, factors in tensors.factors.items():
        module = full_names[short]
        name, a, b = modules[module], factors["A"], factors["B"]
        if any(f".{part}." in name for part in PERMUTED_PARTS):
            b.head_dim = checkpoint.params["head_dim"]
        updates[name] = LowRankUpdate(config.scale(module), a, b, transposed=short == EMBEDDING_MODULE)
    return updates


def _check_shapes(
    tensors: AdapterTensors,
    full_names: Mapping[str, str],
    modules: Mapping[str, str],
    config: AdapterConfig,
    checkpoint: Checkpoint,
) -> None:
    shapes = {}
    for short, factors in tensors.factors.items():
        module = full_names[short]
        rank, (rows, columns) = config.rank(module), _weight(checkpoint, modules[module]).shape
        if short == EMBEDDING_MODULE:
            rows, columns = columns, rows
        shapes[f"A of {module}"] = ((rank, columns), factors["A"].shape)
        shapes[f"B of {module}"] = ((rows, rank), factors["B"].shape)
    rule = f"its rank and {checkpoint.path} require (the adapter was trained on {config.base})"
    check_shapes(tensors.path, rule, shapes)


def _check_copies(
    tensors: AdapterTensors, full_names: Mapping[str, str], modules: Mapping[str, str], checkpoint: Checkpoint
) -> None:
    """Raise ValueError if a stored embedding or output is not the base's: then it was trained."""
    for short, copy in tensors.copies.items():
        base = _weight(checkpoint, modules[full_names[short]])
        if copy.shape != base.shape or not same_values(base, ShardedTensor((copy,))):
            raise ValueError(
                f"{tensors.path}: holds a complete {short} that is not that of {checkpoint.path}: it was trained or "
                f"extended, or the base is another one; {MERGE_WITH_PEFT}"
            )


def _weight(checkpoint: Checkpoint, name: str) -> ShardedTensor:
    """A weight of the base; a tied output is the embedding."""
    tied = checkpoint.params["tied_output"] and name == OUTPUT_NAME
    return dense(checkpoint.stored[EMBEDDING_NAME if tied else name])
