"""What files say twice must agree, and what they say once must differ: contents against names.

The norms are in each of Meta's shards, a kv head in several where there are more shards than heads, and an output that
is tied may lie beside the embedding. Opening reads the norms, which are small, and samples of the rest; a kv head is
compared whole when it is read, too late for more than a warning. A tied output is compared whole when opening, because
the model's size depends on it.

Copies in shards need not be equal bit for bit: each process trained its own, and the norms of Meta's Llama 3 70B are
reported to lie up to 0.01 apart (jetstream-pytorch, pull request 101). How far others lie apart no one has said, so
distance alone is no error. Those of another model, or of another part, vary in other places too: they do not correlate.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.checkpoint.pth_shard import Shard
from fastllama.checkpoint.sharding import Piece, Stored
from fastllama.checkpoint.weight_files import MOST_DIGITS, NUMBER
from fastllama.rope import rope_table

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 2**13
SAMPLES = 4
CHUNK_BYTES = 2**24
FREQUENCY_TOLERANCE = 0.02  # they may be stored in bfloat16
DRIFT = 2.0**-6  # of the value, and of the largest, that says nothing: four units in the last place of bfloat16
LEAST_CORRELATION = 0.5  # of copies that differ by more; other tensors are near 0, fine-tunes of one base near 1


class Copies:
    """One part of a weight that several files hold. `narrow` reads it from the first."""

    def __init__(self, name: str, tensors: Sequence[torch.Tensor], paths: Sequence[Path]) -> None:
        self.name = name
        self._tensors = tensors
        self._paths = paths
        self._known_to_differ = False
        self.shape = tuple(tensors[0].shape)
        self.dtype = tensors[0].dtype

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """The first file's; a warning where another differs in the part that is read, once for all parts."""
        first, *others = (tensor.narrow(dim, start, length) for tensor in self._tensors)
        for path, other in zip(self._paths[1:], others, strict=True):
            if not self._known_to_differ and not same_bits(first, other):
                self._known_to_differ = True
                logger.warning("%s: its %s is not %s's, which is used", path, self.name, self._paths[0].name)
        return first

    def samples_differ(self) -> bool:
        """Whether norms, or parts of a matrix, differ at all; ValueError where a file's are plainly another tensor's.

        A caller that is told so says it, and `narrow` does not say it again.
        """
        first, *others = ([part.float() for part in _samples(tensor)] for tensor in self._tensors)
        for path, other in zip(self._paths[1:], others, strict=True):
            pairs = [(ours, theirs) for ours, theirs in zip(first, other, strict=True) if not same_bits(ours, theirs)]
            self._known_to_differ |= bool(pairs)
            if any(_unrelated(ours, theirs) for ours, theirs in pairs):
                raise ValueError(
                    f"{path}: expected the same {self.name} as in {self._paths[0].name}, its values differ; "
                    "the files are of different checkpoints, or out of order: download all of one"
                )
        return self._known_to_differ


def _samples(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A vector whole; of a matrix SAMPLES parts of SAMPLE_BYTES, or a row's begin, from the first row to the last."""
    if tensor.dim() == 1:
        return [tensor]
    rows = min(tensor.shape[0], _rows_of(tensor, SAMPLE_BYTES))
    starts = [(tensor.shape[0] - rows) * part // (SAMPLES - 1) for part in range(SAMPLES)]
    return [tensor[start : start + rows, : SAMPLE_BYTES // tensor.dtype.itemsize] for start in starts]


def _unrelated(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors, float32, are further apart than drift takes them and vary in different places; or NaN."""
    largest = ours.abs().max().clamp(min=1.0 if ours.dim() == 1 else 0.0)  # norms lie around one
    if bool(((ours - theirs).abs() <= DRIFT * (ours.abs() + largest)).all()):
        return False
    one, other = ((values - values.mean()).flatten().double() for values in (ours, theirs))
    return not bool(torch.cosine_similarity(one, other, dim=0) >= LEAST_CORRELATION)


def check_order(shards: Sequence[Shard]) -> None:
    """ValueError where the files' names contradict what torch.save wrote into them: the name that each had then.

    Those names say something only where their numbers are those of a whole set; others may be steps or process ids.
    """
    numbers = [NUMBER.fullmatch(shard.saved_as) for shard in shards]
    matches = [match for match in numbers if match]
    families = {(match["before"], match["total"], match["after"]) for match in matches}
    if len(matches) < len(shards) or len(families) != 1:
        return
    found = {int(match["number"]) for match in matches if len(match["number"]) <= MOST_DIGITS}
    if found not in (set(range(len(shards))), set(range(1, len(shards) + 1))):
        return
    for (shard, match), (_, after) in pairwise(zip(shards, matches, strict=True)):
        if int(match["number"]) > int(after["number"]):
            raise ValueError(
                f"{shard.path}: was saved as {shard.saved_as}{shard.path.suffix}, so that the files' names contradict "
                "the order in which they were written; give each its first name back, or, where the present names are "
                "right, save each again: torch.save(torch.load(path), path)"
            )


def check_parts_differ(shards: Sequence[Shard], name: str) -> None:
    """ValueError where two shards hold the same part of the split weight `name`, as a file and its copy do."""
    seen: dict[bytes, Shard] = {}
    for shard in shards:
        tensor = shard.tensors[name]
        sample = tensor[: _rows_of(tensor, SAMPLE_BYTES)]
        if bool((sample == sample.flatten()[0]).all()):  # a constant says nothing
            continue
        twin = seen.setdefault(_bits(sample).numpy().tobytes(), shard)
        if twin is not shard:
            raise ValueError(
                f"{shard.path}: holds the same part of {name} as {twin.path.name}; "
                "one is a copy of the other: download the part that is missing"
            )


def warn_of_frequencies(source: Path, name: str, stored: torch.Tensor | None, params: Mapping[str, Any]) -> None:
    """A warning where rotary frequencies (D/2,) that lie beside the weights, and are not read, are not `params`'."""
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


def same_values(one: Stored, other: Stored) -> bool:
    """Whether two matrices (V, dim) hold the same numbers; reads a few MiB at a time, up to the first difference."""
    if one.shape != other.shape:
        return False
    rows = _rows_of(one, CHUNK_BYTES)
    for start in range(0, one.shape[0], rows):
        length = min(rows, one.shape[0] - start)
        ours, theirs = one.narrow(0, start, length), other.narrow(0, start, length)
        if ours.dtype != theirs.dtype:
            ours, theirs = ours.float(), theirs.float()
        if not torch.equal(ours, theirs):
            return False
    return True


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of a shape and dtype are equal bit for bit, NaNs included."""
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype.itemsize == torch.int32.itemsize else torch.int16)


def _rows_of(piece: Piece | Stored, most_bytes: int) -> int:
    """How many rows of a matrix are about so many bytes."""
    dtype = piece.pieces[0].dtype if isinstance(piece, Stored) else piece.dtype
    row = dtype.itemsize
    for size in piece.shape[1:]:
        row *= size
    return max(1, most_bytes // row)
