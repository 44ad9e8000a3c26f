"""What all bodies of answers have in common, whole or in chunks."""

import time
import uuid
from dataclasses import dataclass
from typing import Any

from fastllama.tokenizer_base import BaseTokenizer


@dataclass(frozen=True)
class ServedModel:
    """The model that answers, as bodies of answers name it."""

    name: str
    tokenizer: BaseTokenizer
    fingerprint: str | None = None  # of everything that decides about answers to a request with a seed


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def envelope(prefix: str, kind: str, model: ServedModel, requested_name: str | None) -> dict[str, Any]:
    """The fields of a body of this kind, without its choices."""
    return {
        "id": new_id(prefix),
        "object": kind,
        "created": int(time.time()),
        "model": requested_name or model.name,
        "system_fingerprint": model.fingerprint,
    }
