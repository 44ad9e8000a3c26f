"""Counts answers that part at near ties, and fails for those that part elsewhere."""

from collections.abc import Sequence
from typing import Any

from fastllama import Llama
from fastllama.benchmarks.near_ties import partings


def count_near_ties(
    llm: Llama,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    **sampling: Any,
) -> int:
    """How many answers part at a near tie. sampling: as for `partings`."""
    parted = partings(llm, prompts, found, expected, **sampling)
    assert all(one.is_near_tie for one in parted), f"answers part, and not at a near tie: {parted}"
    return len(parted)
