"""Builds a tiny Llama for tests, through the public interface from a checkpoint on disk."""

from pathlib import Path
from typing import Any

import torch

from fastllama import Llama
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

MAX_SEQ_LEN = 48
MAX_BATCH_SIZE = 4


def tiny_llama(
    folder: Path,
    shards: int = 1,
    seed: int = 1,
    max_seq_len: int = MAX_SEQ_LEN,
    backend: str | None = None,
    **params: Any,
) -> Llama:
    """A Llama with random weights. The tokenizer's stop tokens are unchanged."""
    fields = tiny_params(**params)
    write_meta(folder, fields, random_weights(fields, seed=7), shards=shards)
    tokenizer = write_tokenizer(folder)
    sizes = max_seq_len, MAX_BATCH_SIZE
    return Llama.build(str(folder), str(tokenizer), *sizes, seed=seed, device="cpu", backend=backend)


def write_endless_checkpoint(folder: Path) -> str:
    """Write a checkpoint with equal logits: greedy generation repeats token 0 and never stops -> its folder."""
    weights = random_weights(tiny_params(), seed=7)
    write_meta(folder, tiny_params(), weights | {"output.weight": torch.zeros_like(weights["output.weight"])})
    write_tokenizer(folder)
    return str(folder)
