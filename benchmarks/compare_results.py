"""Compares two result files: which figures became better or worse by more than the spread of their samples."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fastllama.benchmarks.environment import Environment
from fastllama.benchmarks.result_file import FAILED, ResultFile
from fastllama.benchmarks.tables import Record, Table

DEFAULT_THRESHOLD = 0.05  # a smaller change gets no verdict
DRIFT = 0.1  # change of the machine's bandwidth that gets a warning
# Two records belong to the same case if these keys have the same values.
IDENTITY = (
    *("suite", "model", "dtype", "quantize", "op", "launch", "variant", "case"),
    *("task", "sampling", "speculate", "draft", "n_guesses"),
    *("batch", "context", "tokens", "steps", "requests", "prefix", "max_concurrency"),
    *("dependent_launch", "interpreted"),
)
# A record's figures. From each line, the first name that both records have is compared.
FIGURES = (
    ("tokens_per_second", "microseconds", "seconds"),
    ("median_ttft_ms",),
    ("p99_itl_ms",),
    ("peak_host_bytes", "peak_bytes"),
    ("held_bytes",),
)
HIGHER_IS_BETTER = ("tokens_per_second",)
NO_SPEEDS = ("tests", "kernel tests")  # suites of a GPU report whose seconds are not compared
BETTER, REGRESSION, NO_CHANGE, NO_SPREAD = "better", "REGRESSION", "", "no spread"

Key = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Change:
    """One figure in both files. `ratio` is above 1 if the second is better; `low` and `high` follow from the spreads.

    The verdict is empty unless the complete range is beyond the threshold. A time that was measured once gets none.
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
    """The changes, and the cases that only one file has."""

    changes: list[Change]
    broken: list[str]  # cases of the first file that failed or had wrong output in the second
    only_first: list[str]
    only_second: list[str]
    read_ratio: float | None  # the second file's read bandwidth over the first's

    @property
    def regressions(self) -> list[Change]:
        """The changes that are worse, without the broken cases."""
        return [change for change in self.changes if change.verdict == REGRESSION]

    @property
    def fails(self) -> bool:
        return bool(self.regressions or self.broken)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_results(
    first: ResultFile, second: ResultFile, threshold: float = DEFAULT_THRESHOLD, anyway: bool = False
) -> Comparison:
    """Compare every figure that both files have, in the first file's order.

    ValueError for files from different machines, unless `anyway`, and for files without a common figure.
    """
    if not anyway and (difference := _machines_differ(first.environment, second.environment)):
        raise ValueError(f"the files are from different machines: {difference}; use --anyway to compare them")
    before, after = _by_key(first), _by_key(second)
    failed = {_key(one): one for one in second.records if one.get("status") in FAILED}
    broken = [f"{_label(dict(key))}: {failed[key]['not_run']}" for key in before if key in failed]
    changes = [
        change
        for key, record in before.items()
        if key in after
        for change in _changes(dict(key), record, after[key], threshold)
    ]
    if not changes and not broken:
        raise ValueError("the files have no figure in common: nothing was measured in both")
    reads = [result.ceilings["read"].value for result in (first, second) if "read" in result.ceilings]
    return Comparison(
        changes,
        broken,
        only_first=[_label(dict(key)) for key in before if key not in after and key not in failed],
        only_second=[_label(dict(key)) for key in after if key not in before],
        read_ratio=reads[1] / reads[0] if len(reads) == 2 else None,
    )


def report(comparison: Comparison, first: ResultFile, second: ResultFile, in_markdown: bool = False) -> str:
    """A comparison as text or Markdown."""
    table = Table(["", "figure", "first", "second", "ratio", "range", ""], list(map(_cells, comparison.changes)))
    lines = [_describe(name, result) for name, result in (("first ", first), ("second", second))]
    if comparison.read_ratio is not None:
        lines.append(f"read bandwidth: {comparison.read_ratio:.2f}x in the second")
        if not 1 - DRIFT < comparison.read_ratio < 1 + DRIFT:
            lines.append("the machine's bandwidth changed between the runs: measure both again, one after the other")
    lines += ["", table.text(in_markdown), ""]
    for which, labels in (("first", comparison.only_first), ("second", comparison.only_second)):
        lines += [f"only in the {which}: {label}" for label in labels]
    lines += [f"BROKEN in the second: {text}" for text in comparison.broken]
    found = len(comparison.regressions)
    lines.append(f"{found} regressions" if found != 1 else "1 regression")
    return "\n".join(lines)


def _cells(change: Change) -> list[str]:
    values = [f"{change.first:.4g}", f"{change.second:.4g}", f"{change.ratio:.2f}x"]
    return [_label(change.of), change.figure, *values, f"{change.low:.2f}-{change.high:.2f}", change.verdict]


def _machines_differ(first: Environment, second: Environment) -> str | None:
    names = ("device_name", "threads") if first.device == "cpu" else ("device_name",)
    differing = [name for name in names if getattr(first, name) != getattr(second, name)]
    return "; ".join(f"{name} {getattr(first, name)} and {getattr(second, name)}" for name in differing) or None


def _key(record: Record) -> Key:
    return tuple((name, record[name]) for name in IDENTITY if name in record)


def _by_key(result: ResultFile) -> dict[Key, Record]:
    """The records that have a figure."""
    names = [name for alternatives in FIGURES for name in alternatives]
    return {
        _key(record): record
        for record in result.records
        if record["suite"] not in NO_SPEEDS and any(record.get(name) for name in names)
    }


def _changes(of: dict[str, Any], first: Record, second: Record, threshold: float) -> Iterator[Change]:
    for alternatives in FIGURES:
        name = next((name for name in alternatives if first.get(name) and second.get(name)), None)
        if name is not None:
            yield _change(of, name, first, second, threshold)


def _change(of: dict[str, Any], name: str, first: Record, second: Record, threshold: float) -> Change:
    (first_low, first_mid, first_high), (second_low, second_mid, second_high) = (
        _spread(record, name) for record in (first, second)
    )
    if name in HIGHER_IS_BETTER:
        ratio, low, high = second_mid / first_mid, second_low / first_high, second_high / first_low
    else:
        ratio, low, high = first_mid / second_mid, first_low / second_high, first_high / second_low
    verdict = REGRESSION if high < 1 - threshold else BETTER if low > 1 + threshold else NO_CHANGE
    if not (name.endswith("_bytes") or all(_repeated(record, name) for record in (first, second))):
        verdict = NO_SPREAD
    return Change(of, name, first_mid, second_mid, ratio, low, high, verdict)


def _repeated(record: Record, name: str) -> bool:
    """Whether a figure was measured more than once."""
    value = record[name]
    return bool(value["count"] > 1) if isinstance(value, dict) else "slowest" in record


def _spread(record: Record, name: str) -> tuple[float, float, float]:
    """(p10, median, p90) of a figure, or its slowest, median and fastest. A single number is all three."""
    value = record[name]
    if isinstance(value, dict):
        return value["p10"], value["p50"], value["p90"]
    low, high = (record.get(end, value) for end in ("slowest", "fastest"))
    return float(low or value), value, float(high or value)


def _label(of: dict[str, Any]) -> str:
    names = ("suite", "model", "op", "launch", "variant", "case", "task", "sampling", "speculate")
    plain = [str(of[name]) for name in names if of.get(name)]
    counts = ("batch", "context", "tokens", "dependent_launch")
    sizes = [f"{name} {of[name]}" for name in counts if of.get(name) is not None]
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
