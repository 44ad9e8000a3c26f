"""Which files of a folder are a checkpoint's weights, decided by what they are called, and in which order.

A suffix says little: folders hold optimizer states, adapters, half downloads and what file managers leave behind. What
is called neither a checkpoint nor a part of one is passed over, with its reason, and `Checkpoint.passed_over` and the
log tell. What names leave open, such as the order of a.pth and b.pth, is refused.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fastllama.checkpoint.json_config import listing

SHARD_PATTERN = "*.pth"
FILE_PATTERN = "*.safetensors"
MOST_PARTS = 4096
MOST_DIGITS = 9

# Files of a training run, as accelerate, DeepSpeed, Lightning, torchtune and transformers call them.
STATES = (
    r"(optim(izer)?|(lr_)?scheduler|(grad_)?scaler|rng_states?|random_states?|(train(er|ing)?|recipe)_(args|state))"
)
TRAINING_STATE = re.compile(rf"{STATES}([._-].*)?|.*[._-]{STATES}", re.IGNORECASE)
ADAPTER = re.compile(r"adapter(_model|s)?([._-].*)?|lora(_weights)?", re.IGNORECASE)
COPY = re.compile(r".*( \([0-9]+\)| - copy.*| copy( [0-9]+)?)", re.IGNORECASE)
METAS_NAME = re.compile(r"consolidated([._-]?[0-9]+)?([._-]of[._-][0-9]+)?")
# The last number in a name, and how many parts there are, where "of" says so.
NUMBER = re.compile(r"(?P<before>.*?)(?P<number>[0-9]+)([._-]?of[._-]?(?P<total>[0-9]+))?(?P<after>[^0-9]*)")

AN_ADAPTER = "an adapter, which is not applied"

Reasoned = tuple[Path, str]


@dataclass
class WeightFiles:
    """The files that are a checkpoint's by their names, and those that are not, each with the reason."""

    taken: list[Path] = field(default_factory=list)
    passed_over: list[Reasoned] = field(default_factory=list)

    def drop(self, is_other: Callable[[Path], bool], reason: str, unless_all: bool = False) -> None:
        """Pass over what `is_other`; with `unless_all`, nothing where that is all there is."""
        others = [path for path in self.taken if is_other(path)]
        if not (unless_all and len(others) == len(self.taken)):
            self.passed_over += [(path, reason) for path in others]
            self.taken = [path for path in self.taken if path not in others]

    def keep(self, kept: Collection[Path], reason: str) -> None:
        """Take just `kept`, in its order, and pass over the others."""
        self.drop(lambda path: path not in kept, reason)
        self.taken = list(kept)


def meta_files(folder: Path) -> WeightFiles:
    """Meta's shards in a folder by their names; `in_order` checks that they are all and orders them.

    Where any file is called `consolidated`, only those are taken, else every `*.pth` that is called no other thing.
    """
    files = _candidates(folder, SHARD_PATTERN)
    files.drop(lambda path: not METAS_NAME.fullmatch(path.stem), "not called consolidated.NN.pth", unless_all=True)
    return files


def huggingface_files(folder: Path) -> WeightFiles:
    """The safetensors in a folder by their names; for a folder without an index, `whole_set` narrows them down."""
    files = _candidates(folder, FILE_PATTERN)
    files.drop(lambda path: bool(METAS_NAME.fullmatch(path.stem)), "called as in Meta's layout", unless_all=True)
    return files


def whole_set(folder: Path, files: WeightFiles) -> None:
    """Where some safetensors are called model-00001-of-00002, take just that set, else all that there are.

    Each holds whole tensors, so their order says nothing. ValueError where parts are missing or two sets lie there.
    """
    sets: dict[tuple[str, str, str], list[Path]] = {}
    for path in files.taken:
        match = NUMBER.fullmatch(path.stem)
        if match and match["total"]:
            sets.setdefault((match["before"], match["total"], match["after"]), []).append(path)
    sets = {key: parts for key, parts in sets.items() if key[0] == "model-"} or sets
    if len(sets) > 1:
        first = [parts[0].name for parts in sets.values()]
        raise ValueError(
            f"{folder}: holds parts of {len(sets)} checkpoints, such as {listing(first)}; "
            "move those that are not wanted elsewhere"
        )
    for (before, total, _), parts in sets.items():
        files.keep(in_order(folder, parts), f"not called {before}NNNNN-of-{total}")


def in_order(folder: Path, files: list[Path]) -> list[Path]:
    """The parts of one checkpoint in the order of the numbers in their names.

    Numbers count from 0, or from 1 where the files are not called as Meta's. One file alone may have any name but that
    of one part of several. ValueError unless the names say which part each file is, each part once and none missing.
    """
    matches = {path: NUMBER.fullmatch(path.stem) for path in files}
    metas = all(METAS_NAME.fullmatch(path.stem) for path in files)
    if len(files) == 1:
        match = matches[files[0]]
        if not match or not (metas or match["total"]):
            return files
    numbers: dict[int, Path] = {}
    families: set[tuple[str, str | None, str]] = set()
    for path, match in matches.items():
        if not match or len(match["number"]) > MOST_DIGITS or int(match["number"]) >= MOST_PARTS:
            raise _unordered(folder, files, f"{listing([path.name])} has no number that says which part it is")
        number = int(match["number"])
        if number in numbers:
            both = " and ".join(listing([one.name]) for one in (numbers[number], path))
            raise _unordered(folder, files, f"{both} are both part {number}")
        numbers[number] = path
        families.add((match["before"], match["total"], match["after"]))
    if len(families) > 1:
        raise _unordered(folder, files, "they are not called alike")
    ((before, total, after),) = families
    expected = _expected(numbers, int(total) if total else None, metas)
    if extra := [path.name for number, path in numbers.items() if number >= expected.stop]:
        raise _unordered(folder, files, f"{listing(extra)} is beyond the {len(expected)} that there should be")
    if missing := [number for number in expected if number not in numbers]:
        width = min(len(match["number"]) for match in matches.values() if match)
        end = (f"-of-{total}" if total else "") + after + files[0].suffix
        names = [f"{before}{number:0{width}d}{end}" for number in missing]
        raise ValueError(f"{folder}: shards are missing: {listing(names)}; download them")
    return [numbers[number] for number in expected]


def _expected(numbers: Iterable[int], total: int | None, metas: bool) -> range:
    """The numbers that a whole set has."""
    present = set(numbers)
    begin = 0 if 0 in present or (metas and total is None) else 1
    return range(begin, max(present) + 1 if total is None else begin + min(total, MOST_PARTS))


def _unordered(folder: Path, files: list[Path], why: str) -> ValueError:
    rename = "call the parts consolidated.00.pth, consolidated.01.pth and so on, and "
    return ValueError(
        f"{folder}: {len(files)} files may be parts of the checkpoint, and their names do not say which: {why}; "
        f"{rename if files[0].match(SHARD_PATTERN) else ''}move those that are not wanted elsewhere"
    )


def _candidates(folder: Path, pattern: str) -> WeightFiles:
    """What ends in the suffix and is not called something else."""
    files = WeightFiles(sorted(folder.glob(pattern)))
    files.drop(lambda path: path.name.startswith("."), "hidden")
    files.drop(lambda path: bool(TRAINING_STATE.fullmatch(path.stem)), "a training run's state")
    files.drop(lambda path: bool(ADAPTER.fullmatch(path.stem)), AN_ADAPTER)
    # The rest is what a set may be made of. Where nothing else is there, reading it says what is wrong with it.
    files.drop(lambda path: bool(COPY.fullmatch(path.stem)), "a second copy", unless_all=True)
    files.drop(os.path.isdir, "a folder", unless_all=True)
    files.drop(lambda path: not os.path.exists(path) and not _is_part(path), "a link to nothing", unless_all=True)
    return files


def _is_part(path: Path) -> bool:
    """Whether a set would lack this file."""
    match = NUMBER.fullmatch(path.stem)
    return bool(METAS_NAME.fullmatch(path.stem) or (match and match["total"]) or path.stem == "model")
