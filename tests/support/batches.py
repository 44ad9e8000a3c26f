"""Files of requests for `fastllama batch`, and their answers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BATCH = ("--device", "cpu", "--max_seq_len", "256", "--max_batch_size", "4")


def completion(custom_id: str, prompt: Any = "Once upon a time", **body: Any) -> Record:
    body = {"model": "m", "prompt": prompt, "max_tokens": 6, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, text: str = "What is the capital of France?", **body: Any) -> Record:
    messages = [{"role": "user", "content": text}]
    body = {"model": "m", "messages": messages, "max_tokens": 6, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_batch(path: Path, lines: Iterable[Record | str]) -> str:
    """Write the lines; a text is written as it is -> the path."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def read_records(path: Path) -> dict[str, Record]:
    """The lines of a file of answers by custom_id, each of which is there once."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {str(record["custom_id"]): record for record in records}
    assert len(found) == len(records), "a custom_id has two lines"
    return found


def choices(record: Record) -> list[Record]:
    """The answers of a line."""
    assert record["error"] is None, record["error"]
    found: list[Record] = record["response"]["body"]["choices"]
    return found


def all_choices(path: Path) -> dict[str, list[Record]]:
    """The answers of a file by custom_id: what is the same in every run."""
    return {custom_id: choices(record) for custom_id, record in read_records(path).items()}
