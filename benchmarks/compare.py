"""Two result files beside each other: what became faster, what slower, and whether their spread allows to say so."""

from dataclasses import asdict, dataclass
from typing import Any

from fastllama.benchmarks.environment import Environment
from fastllama.benchmarks.result_file import FAILED, ResultFile
from fastllama.benchmarks.tables import aligned, markdown

DEFAULT_THRESHOLD = 0.05  # of change that is worth a mark
DRIFT = 0.1  # of the machine's bandwidth that is worth a warning
# What says that two records are of the same thing.
IDENTITY = (
    *("suite", "model", "dtype", "op", "launch", "variant", "case"),
    *("batch", "context", "tokens", "steps", "dependent_launch", "interpreted"),
)
# A record's figures, by the first of each line that it has; True where more is better.
FIGURES: tuple[tuple[tuple[str, bool], ...], ...] = (
    (("tokens_per_second", True), ("microseconds", False), ("seconds", False)),
    (("median_ttft_ms", False),),
    (("p99_itl_ms", False),),
    (("peak_host_bytes", False), ("peak_bytes", False)),
    (("held_bytes", False),),
)
NO_SPEEDS = ("tests", "kernel tests")  # the suites of a GPU report whose seconds say nothing
FASTER, SLOWER, ALIKE, NO_SPREAD = "better", "REGRESSION", "", "no spread"

Record = dict[str, Any]
Key = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Change:
    """One figure in both files. `ratio` is above 1 where the second is better, with the range that the spreads leave.

    `verdict` marks a change whose whole range lies beyond the threshold. A time that was measured once has no range,
    and no verdict; bytes need none.
    """

    of: dict[str, Any]
    figure: str
    first: float
    second: float
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """The changes, and the records that only one of the files has.

    broken: what was measured in the first, and in the second was not because it failed or its output is wrong.
    """

    changes: list[Change]
    broken: list[str]
    only_first: list[str]
    only_second: list[str]
    read_ratio: float | None  # of the machines' read bandwidth, the second's over the first's

    @property
    def regressions(self) -> list[Change]:
        """Changes for the worse. What is broken is worse still."""
        return [change for change in self.changes if change.verdict == SLOWER]

    @property
    def fails(self) -> bool:
        return bool(self.regressions or self.broken)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_results(
    first: ResultFile, second: ResultFile, threshold: float = DEFAULT_THRESHOLD, anyway: bool = False
) -> Comparison:
    """Every figure that both files have, in the first one's order.

    ValueError for files of different machines, unless `anyway`, and for files that have nothing in common.
    """
    if not anyway and (difference := _machines_differ(first.environment, second.environment)):
        raise ValueError(
            f"the files are of different machines: {difference}; say --anyway to compare them all the same"
        )
    records = [_by_key(result) for result in (first, second)]
    states = {_key(one): one for one in second.records if one.get("status") in FAILED}
    broken = [f"{_label(dict(key))}: {states[key]['not_run']}" for key in records[0] if key in states]
    changes = [
        change
        for key, record in records[0].items()
        if key in records[1]
        for change in _changes(key, record, records[1][key], threshold)
    ]
    if not changes and not broken:
        raise ValueError("the files have no figure in common: nothing was measured in both")
    reads = [result.ceilings["read"].value for result in (first, second) if "read" in result.ceilings]
    return Comparison(
        changes,
        broken,
        only_first=_missing(records[0], records[1] | states),
        only_second=_missing(records[1], records[0]),
        read_ratio=reads[1] / reads[0] if len(reads) == 2 else None,
    )


def report(comparison: Comparison, first: ResultFile, second: ResultFile, in_markdown: bool = False) -> str:
    """A comparison for people."""
    head = ["", "figure", "first", "second", "ratio", "range", ""]
    rows = [
        [
            _label(change.of),
            change.figure,
            f"{change.first:.4g}",
            f"{change.second:.4g}",
            f"{change.ratio:.2f}x",
            f"{change.low:.2f}-{change.high:.2f}",
            change.verdict,
        ]
        for change in comparison.changes
    ]
    layout = markdown if in_markdown else aligned
    lines = [_describe(name, result) for name, result in (("first ", first), ("second", second))]
    if comparison.read_ratio is not None:
        lines.append(f"read bandwidth: {comparison.read_ratio:.2f}x in the second")
        if not 1 - DRIFT < comparison.read_ratio < 1 + DRIFT:
            lines.append("the machine itself was another then: measure both again, one behind the other")
    lines += ["", layout(head, rows), ""]
    for which, labels in (("first", comparison.only_first), ("second", comparison.only_second)):
        lines += [f"only in the {which}: {label}" for label in labels]
    lines += [f"BROKEN in the second: {text}" for text in comparison.broken]
    found = len(comparison.regressions)
    lines.append(f"{found} regressions" if found != 1 else "1 regression")
    return "\n".join(lines)


def _machines_differ(first: Environment, second: Environment) -> str | None:
    names = ("device_name", "threads") if first.device == "cpu" else ("device_name",)
    differing = [name for name in names if getattr(first, name) != getattr(second, name)]
    return "; ".join(f"{name} {getattr(first, name)} and {getattr(second, name)}" for name in differing) or None


def _key(record: Record) -> Key:
    return tuple((name, record[name]) for name in IDENTITY if name in record)


def _by_key(result: ResultFile) -> dict[Key, Record]:
    """Those records that hold a figure."""
    names = [name for alternatives in FIGURES for name, _ in alternatives]
    return {
        _key(record): record
        for record in result.records
        if record["suite"] not in NO_SPEEDS and any(record.get(name) for name in names)
    }


def _missing(mine: dict[Key, Record], others: dict[Key, Record]) -> list[str]:
    """What of mine the others have not."""
    return [_label(dict(key)) for key in mine if key not in others]


def _changes(key: Key, first: Record, second: Record, threshold: float) -> list[Change]:
    found = []
    for names in FIGURES:
        for name, more_is_better in names:
            if first.get(name) and second.get(name):
                found.append(_change(dict(key), name, more_is_better, first, second, threshold))
                break
    return found


def _change(
    of: dict[str, Any], name: str, more_is_better: bool, first: Record, second: Record, threshold: float
) -> Change:
    (first_low, first_mid, first_high), (second_low, second_mid, second_high) = (
        _spread(record, name) for record in (first, second)
    )
    if more_is_better:
        ratio, low, high = second_mid / first_mid, second_low / first_high, second_high / first_low
    else:
        ratio, low, high = first_mid / second_mid, first_low / second_high, first_high / second_low
    verdict = SLOWER if high < 1 - threshold else FASTER if low > 1 + threshold else ALIKE
    if not (name.endswith("_bytes") or all(_repeated(record, name) for record in (first, second))):
        verdict = NO_SPREAD
    return Change(of, name, first_mid, second_mid, ratio, low, high, verdict)


def _repeated(record: Record, name: str) -> bool:
    """Whether a figure was measured more than once."""
    value = record[name]
    return bool(value["count"] > 1) if isinstance(value, dict) else "slowest" in record


def _spread(record: Record, name: str) -> tuple[float, float, float]:
    """(p10, median, p90) of a figure, or the slowest, middle and fastest; one number has no spread."""
    value = record[name]
    if isinstance(value, dict):
        return value["p10"], value["p50"], value["p90"]
    low, high = (record.get(end, value) for end in ("slowest", "fastest"))
    return float(low or value), value, float(high or value)


def _label(of: dict[str, Any]) -> str:
    plain = [str(of[name]) for name in ("suite", "model", "op", "launch", "variant", "case") if of.get(name)]
    sizes = [f"{name} {of[name]}" for name in ("batch", "context", "tokens", "dependent_launch") if name in of]
    return " ".join(plain + sizes)


def _describe(name: str, result: ResultFile) -> str:
    environment = result.environment
    processes = max((record.get("nproc", 1) for record in result.records), default=1)
    shared = f" on {processes} processes" if processes > 1 else ""
    commit = (environment.git_commit or "unknown")[:10] + (", changed" if environment.git_dirty else "")
    return (
        f"{name} {environment.device_name}, {environment.threads} threads{shared}, torch {environment.torch}, "
        f"commit {commit}, {environment.date}"
    )
