"""The result file: the environment, the ceilings and the records of a run, as JSON."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.environment import Environment
from fastllama.benchmarks.statistics import Summary

SCHEMA_VERSION = 2
FAILED = ("disagrees", "failed")  # statuses that are failures, of a record or a peer in it
AS_STORED = "as stored"  # the "quantize" of weights that are quantised in the files, and stay so
MAX_REASON = 300  # characters


@dataclass(frozen=True)
class ResultFile:
    """What a run measured. `records` are JSON objects, one for each case; each suite has its own keys."""

    environment: Environment
    ceilings: dict[str, Ceiling]
    records: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def write_result(result: ResultFile, path: str | Path) -> None:
    """Write `result` as JSON. OSError if that fails."""
    write_text(json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n", path)


def write_text(text: str, path: str | Path) -> None:
    """Write a file atomically: a reader sees the old text or the new one. OSError if that fails."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private, and others may read a result.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_result(path: str | Path) -> ResultFile:
    """The result in the file `path`. ValueError if it is not a result file of this schema version."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a result file: expected JSON, got {error}") from error
    found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
    if found != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: expected a result file of schema version {SCHEMA_VERSION}, got {found}; measure again"
        )
    try:
        ceilings = {
            name: Ceiling(**{**value, "samples": Summary(**value["samples"])})
            for name, value in data["ceilings"].items()
        }
        environment = Environment(**data["environment"])
        return ResultFile(environment, ceilings, list(data["records"]), bool(data["interrupted"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a complete result file: {error!r}; measure again") from error


def one_line(error: object) -> str:
    """An error's message as the reason in a record: without line breaks, cut after MAX_REASON characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."
