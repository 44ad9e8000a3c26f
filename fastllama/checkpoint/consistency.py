"""Compares tensors that a checkpoint holds more than once, and checks that shards are different and in order.

Each of Meta's shards holds the norms. If there are more shards than kv heads, several hold the same kv head. A tied
output may be stored beside the embedding. Opening compares the norms, samples of the kv heads, and the complete tied
output, because the model's size depends on it. The rest of a kv head is compared when it is read; then a difference
gives only a warning.

Copies in shards need not be bitwise equal: each process trained its own copy, and the norms of Meta's Llama 3 70B are
reported to differ by up to 0.01 (jetstream-pytorch, pull request 101). No limit is known for other models, so a
difference alone is no error. Tensors of another model or another slice do not correlate.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.checkpoint.pth_shard import Shard
from fastllama.checkpoint.sharding import ShardedTensor, TensorShard
from fastllama.checkpoint.weight_files import MAX_DIGITS, NUMBERED_NAME
from fastllama.rope import rope_table

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 2**13
SAMPLES = 4
CHUNK_BYTES = 2**24
FREQUENCY_TOLERANCE = 0.02  # frequencies may be stored in bfloat16
# Differences up to this share of the value and of the tensor's largest value are always accepted. It is four units in
# the last place of bfloat16.
DRIFT_TOLERANCE = 2.0**-6
MIN_CORRELATION = 0.5  # of copies that differ by more. Unrelated tensors are near 0, fine-tunes of one base near 1


class ReplicatedShard:
    """A part of a weight that several files hold. It is read from the first file."""

    def __init__(self, name: str, tensors: Sequence[torch.Tensor], paths: Sequence[Path]) -> None:
        self.name = name
        self._tensors = tensors
        self._paths = paths
        self._known_to_differ = False
        self.shape = tuple(tensors[0].shape)
        self.dtype = tensors[0].dtype

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """The first file's values. Warns, once per object, if another file differs in the part that is read."""
        first, *others = (tensor.narrow(dim, start, length) for tensor in self._tensors)
        for path, other in zip(self._paths[1:], others, strict=True):
            if not self._known_to_differ and not same_bits(first, other):
                self._known_to_differ = True
                logger.warning(
                    "%s: its %s differs from that in %s, which is used", path, self.name, self._paths[0].name
                )
        return first

    def samples_differ(self) -> bool:
        """Whether the copies' norms, or samples of their matrices, differ. ValueError if a copy is unrelated.

        The caller reports a difference; `narrow` does not warn again.
        """
        first, *others = ([part.float() for part in _samples(tensor)] for tensor in self._tensors)
        for path, other in zip(self._paths[1:], others, strict=True):
            pairs = [(left, right) for left, right in zip(first, other, strict=True) if not same_bits(left, right)]
            self._known_to_differ |= bool(pairs)
            if any(_are_unrelated(left, right) for left, right in pairs):
                raise ValueError(
                    f"{path}: expected the same {self.name} as in {self._paths[0].name}, but its values differ; "
                    "the files are of different checkpoints or in the wrong order: download all files of one checkpoint"
                )
        return self._known_to_differ


def _samples(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A complete vector; of a matrix SAMPLES parts, evenly spaced from the first to the last row.

    Each part is SAMPLE_BYTES of complete rows, or the beginning of one row if a row is longer.
    """
    if tensor.dim() == 1:
        return [tensor]
    rows = min(tensor.shape[0], _rows_in(tensor, SAMPLE_BYTES))
    starts = [(tensor.shape[0] - rows) * part // (SAMPLES - 1) for part in range(SAMPLES)]
    return [tensor[start : start + rows, : SAMPLE_BYTES // tensor.dtype.itemsize] for start in starts]


def _are_unrelated(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two float32 tensors differ by more than DRIFT_TOLERANCE and do not correlate, or hold NaN."""
    largest = left.abs().max().clamp(min=1.0 if left.dim() == 1 else 0.0)  # norms are near one
    if bool(((left - right).abs() <= DRIFT_TOLERANCE * (left.abs() + largest)).all()):
        return False
    left_centred, right_centred = ((values - values.mean()).flatten().double() for values in (left, right))
    return not bool(torch.cosine_similarity(left_centred, right_centred, dim=0) >= MIN_CORRELATION)


def check_shard_order(shards: Sequence[Shard]) -> None:
    """Raise ValueError if the order of the files contradicts the names that torch.save recorded in them.

    Recorded names are compared only if their numbers are those of a complete set; others may be steps or process ids.
    """
    numbers = [NUMBERED_NAME.fullmatch(shard.saved_as) for shard in shards]
    matches = [match for match in numbers if match]
    schemes = {(match["before"], match["total"], match["after"]) for match in matches}
    if len(matches) < len(shards) or len(schemes) != 1:
        return
    present = {int(match["number"]) for match in matches if len(match["number"]) <= MAX_DIGITS}
    if present not in (set(range(len(shards))), set(range(1, len(shards) + 1))):
        return
    for (shard, match), (_, after) in pairwise(zip(shards, matches, strict=True)):
        if int(match["number"]) > int(after["number"]):
            raise ValueError(
                f"{shard.path}: was saved as {shard.saved_as}{shard.path.suffix}, so the files' names contradict the "
                "order in which they were written; restore the original file names, or, if the present names are "
                "right, save each again: torch.save(torch.load(path), path)"
            )


def check_slices_differ(shards: Sequence[Shard], name: str) -> None:
    """Raise ValueError if two shards hold the same slice of the split weight `name`, as a file and its copy do."""
    seen: dict[bytes, Shard] = {}
    for shard in shards:
        tensor = shard.tensors[name]
        sample = tensor[: _rows_in(tensor, SAMPLE_BYTES)]
        if bool((sample == sample.flatten()[0]).all()):  # constant weights are equal in all shards
            continue
        first = seen.setdefault(_bits(sample).numpy().tobytes(), shard)
        if first is not shard:
            raise ValueError(
                f"{shard.path}: holds the same slice of {name} as {first.path.name}; "
                "one is a copy of the other: download the shard that is missing"
            )


def warn_if_frequencies_differ(source: Path, name: str, stored: torch.Tensor | None, params: Mapping[str, Any]) -> None:
    """Warn if stored rotary frequencies (D/2,) differ from those of `params`, which are used."""
    if stored is None or not stored.is_floating_point():
        return
    cos, sin = rope_table(ModelArgs(**{**params, "max_seq_len": 2}))[1].unbind(-1)
    expected = torch.atan2(sin, cos)  # the angles of position 1
    if stored.shape == expected.shape and not torch.allclose(
        stored.float(), expected, rtol=FREQUENCY_TOLERANCE, atol=0
    ):
        logger.warning(
            "%s: %s is not what the configuration gives (rope_theta=%g); the configuration is used, as in transformers",
            source,
            name,
            params["rope_theta"],
        )


def same_values(one: ShardedTensor, other: ShardedTensor) -> bool:
    """Whether two matrices (V, dim) hold the same numbers. Reads CHUNK_BYTES at a time, up to the first difference."""
    if one.shape != other.shape:
        return False
    rows = _rows_in(one, CHUNK_BYTES)
    for start in range(0, one.shape[0], rows):
        length = min(rows, one.shape[0] - start)
        left, right = one.narrow(0, start, length), other.narrow(0, start, length)
        if left.dtype != right.dtype:
            left, right = left.float(), right.float()
        if not torch.equal(left, right):
            return False
    return True


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of the same shape and dtype are bitwise equal, NaNs included."""
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype.itemsize == torch.int32.itemsize else torch.int16)


def _rows_in(tensor: TensorShard | ShardedTensor, n_bytes: int) -> int:
    """How many rows of a matrix fit in `n_bytes`, at least one."""
    dtype = tensor.shards[0].dtype if isinstance(tensor, ShardedTensor) else tensor.dtype
    row_bytes = dtype.itemsize
    for size in tensor.shape[1:]:
        row_bytes *= size
    return max(1, n_bytes // row_bytes)
