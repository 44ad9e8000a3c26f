"""Chooses the weight files in a folder by their names, and sorts Meta's shards by the numbers in their names.

The suffix is not enough: folders also hold optimizer states, adapters, partial downloads and files of file managers.
Files whose names are not those of weights are passed over, each with its reason, which `Checkpoint.passed_over` and the
log show. If the names do not decide, as for the order of a.pth and b.pth, opening fails.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fastllama.checkpoint.json_config import short_list

SHARD_PATTERN = "*.pth"
FILE_PATTERN = "*.safetensors"
MAX_SHARDS = 4096
MAX_DIGITS = 9

# Files of a training run, by the names that accelerate, DeepSpeed, Lightning, torchtune and transformers give them.
STATE_WORDS = (
    r"(optim(izer)?|(lr_)?scheduler|(grad_)?scaler|rng_states?|random_states?|(train(er|ing)?|recipe)_(args|state))"
)
TRAINING_STATE = re.compile(rf"{STATE_WORDS}([._-].*)?|.*[._-]{STATE_WORDS}", re.IGNORECASE)
ADAPTER = re.compile(r"adapter(_model|s)?([._-].*)?|lora(_weights)?", re.IGNORECASE)
SECOND_COPY = re.compile(r".*( \([0-9]+\)| - copy.*| copy( [0-9]+)?)", re.IGNORECASE)
META_NAME = re.compile(r"consolidated([._-]?[0-9]+)?([._-]of[._-][0-9]+)?")
# The last number in a name, and the number of shards after "of", if the name has it.
NUMBERED_NAME = re.compile(r"(?P<before>.*?)(?P<number>[0-9]+)([._-]?of[._-]?(?P<total>[0-9]+))?(?P<after>[^0-9]*)")

ADAPTER_REASON = "an adapter, which is not applied"

PathAndReason = tuple[Path, str]


@dataclass
class WeightFiles:
    """The files chosen as weights, and the files that are passed over, each with the reason."""

    chosen: list[Path] = field(default_factory=list)
    passed_over: list[PathAndReason] = field(default_factory=list)

    def pass_over(self, matches: Callable[[Path], bool], reason: str, unless_all: bool = False) -> None:
        """Pass over the files for which `matches` is true. With `unless_all`, do nothing if it is true for all."""
        matching = [path for path in self.chosen if matches(path)]
        if not (unless_all and len(matching) == len(self.chosen)):
            self.passed_over += [(path, reason) for path in matching]
            self.chosen = [path for path in self.chosen if path not in matching]

    def keep_only(self, paths: Collection[Path], reason: str) -> None:
        """Choose exactly `paths`, in this order, and pass over the others."""
        self.pass_over(lambda path: path not in paths, reason)
        self.chosen = list(paths)


def meta_files(folder: Path) -> WeightFiles:
    """Meta's shards in a folder, chosen by name. `sort_shards` sorts them and checks that none is missing.

    If any file is named `consolidated*`, only those are chosen; else every `*.pth` that is not known to be another kind
    of file.
    """
    files = _candidates(folder, SHARD_PATTERN)
    files.pass_over(lambda path: not META_NAME.fullmatch(path.stem), "not called consolidated.NN.pth", unless_all=True)
    return files


def huggingface_files(folder: Path) -> WeightFiles:
    """The safetensors in a folder, chosen by name. Without an index, `choose_numbered_set` narrows them down."""
    files = _candidates(folder, FILE_PATTERN)
    files.pass_over(lambda path: bool(META_NAME.fullmatch(path.stem)), "called as in Meta's layout", unless_all=True)
    return files


def choose_numbered_set(folder: Path, files: WeightFiles) -> None:
    """If some safetensors are named like model-00001-of-00002, choose only that set; else change nothing.

    Their order does not matter, because each file holds complete tensors. ValueError if files of the set are missing or
    the folder holds two sets.
    """
    sets: dict[tuple[str, str, str], list[Path]] = {}
    for path in files.chosen:
        match = NUMBERED_NAME.fullmatch(path.stem)
        if match and match["total"]:
            sets.setdefault((match["before"], match["total"], match["after"]), []).append(path)
    sets = {key: paths for key, paths in sets.items() if key[0] == "model-"} or sets
    if len(sets) > 1:
        first = [paths[0].name for paths in sets.values()]
        raise ValueError(
            f"{folder}: holds files of {len(sets)} checkpoints, such as {short_list(first)}; "
            "move those that are not wanted elsewhere"
        )
    for (before, total, _), paths in sets.items():
        files.keep_only(sort_shards(folder, paths), f"not called {before}NNNNN-of-{total}")


def sort_shards(folder: Path, files: list[Path]) -> list[Path]:
    """The shards of one checkpoint, sorted by the numbers in their names.

    Numbers count from 0; they may count from 1 if the names are not Meta's. A single file may have any name that does
    not say that it is one of several shards. ValueError unless every file has its own number and no number is missing.
    """
    matches = {path: NUMBERED_NAME.fullmatch(path.stem) for path in files}
    all_meta_names = all(META_NAME.fullmatch(path.stem) for path in files)
    if len(files) == 1:
        match = matches[files[0]]
        if not match or not (all_meta_names or match["total"]):
            return files
    numbers: dict[int, Path] = {}
    schemes: set[tuple[str, str | None, str]] = set()  # names without their numbers
    for path, match in matches.items():
        if not match or len(match["number"]) > MAX_DIGITS or int(match["number"]) >= MAX_SHARDS:
            raise _unclear_order(folder, files, f"{short_list([path.name])} has no usable shard number")
        number = int(match["number"])
        if number in numbers:
            both = " and ".join(short_list([one.name]) for one in (numbers[number], path))
            raise _unclear_order(folder, files, f"{both} both have the number {number}")
        numbers[number] = path
        schemes.add((match["before"], match["total"], match["after"]))
    if len(schemes) > 1:
        raise _unclear_order(folder, files, "they differ in more than the number")
    ((before, total, after),) = schemes
    expected = _expected_numbers(numbers, int(total) if total else None, all_meta_names)
    if extra := [path.name for number, path in numbers.items() if number >= expected.stop]:
        raise _unclear_order(folder, files, f"{short_list(extra)} is beyond the {len(expected)} that there should be")
    if missing := [number for number in expected if number not in numbers]:
        width = min(len(match["number"]) for match in matches.values() if match)
        end = (f"-of-{total}" if total else "") + after + files[0].suffix
        names = [f"{before}{number:0{width}d}{end}" for number in missing]
        raise ValueError(f"{folder}: shards are missing: {short_list(names)}; download them")
    return [numbers[number] for number in expected]


def _expected_numbers(numbers: Iterable[int], total: int | None, all_meta_names: bool) -> range:
    """The numbers of a complete set of shards."""
    present = set(numbers)
    begin = 0 if 0 in present or (all_meta_names and total is None) else 1
    return range(begin, max(present) + 1 if total is None else begin + min(total, MAX_SHARDS))


def _unclear_order(folder: Path, files: list[Path], why: str) -> ValueError:
    rename = "call the shards consolidated.00.pth, consolidated.01.pth and so on, and "
    return ValueError(
        f"{folder}: {len(files)} files may be shards of the checkpoint, but their names do not give the order: {why}; "
        f"{rename if files[0].match(SHARD_PATTERN) else ''}move those that are not wanted elsewhere"
    )


def _candidates(folder: Path, pattern: str) -> WeightFiles:
    """The files that match the pattern, without those that their names show to be something else."""
    files = WeightFiles(sorted(folder.glob(pattern)))
    files.pass_over(lambda path: path.name.startswith("."), "hidden")
    files.pass_over(lambda path: bool(TRAINING_STATE.fullmatch(path.stem)), "a training run's state")
    files.pass_over(lambda path: bool(ADAPTER.fullmatch(path.stem)), ADAPTER_REASON)
    # unless_all: if nothing else is there, reading the files gives the error that says what is wrong with them.
    files.pass_over(lambda path: bool(SECOND_COPY.fullmatch(path.stem)), "a second copy", unless_all=True)
    files.pass_over(os.path.isdir, "a folder", unless_all=True)
    files.pass_over(lambda path: not os.path.exists(path) and not _is_shard(path), "a broken link", unless_all=True)
    return files


def _is_shard(path: Path) -> bool:
    """Whether the name is that of a shard, so that a checkpoint is incomplete without the file."""
    match = NUMBERED_NAME.fullmatch(path.stem)
    return bool(META_NAME.fullmatch(path.stem) or (match and match["total"]) or path.stem == "model")
