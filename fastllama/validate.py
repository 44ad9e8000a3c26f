"""What a caller may pass: every argument's value is checked before any work, and the message says what to do."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

LEAST_SEED, MOST_SEED = -(2**63), 2**64 - 1  # what torch.manual_seed takes


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """value as an int. Raises ValueError where it is not a whole number from `least` to `most`."""
    number = _index(value)
    if number is None or number < least or (most is not None and number > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {wanted}, got {value!r}")
    return number


def temperature(value: Any) -> float:
    """value as a float. Raises ValueError where it is negative, infinite or not a number."""
    return _real("temperature", value, math.inf, "0 (the most likely token) or a positive number")


def top_p(value: Any) -> float:
    """value as a float, at most 1. Raises ValueError where it is negative or not a number."""
    number = _real("top_p", value, None, "a number from 0 (the most likely token) to 1 (the whole vocabulary)")
    return min(number, 1.0)


def seed(value: Any) -> int:
    """value as an unsigned 64-bit seed. Raises ValueError where it is no integer that torch.manual_seed would take."""
    return whole_number("a seed", value, LEAST_SEED, MOST_SEED) % 2**64


def seeds(value: Any, n_rows: int) -> list[int] | int | None:
    """A call's seed: one, one per row, or None. Raises ValueError for anything else."""
    if value is None or _index(value) is not None:
        return None if value is None else seed(value)
    if isinstance(value, str | bytes | set | frozenset | dict) or not isinstance(value, Iterable):
        return seed(value)  # says what a seed must be
    each = list(value)
    if len(each) != n_rows:
        raise ValueError(f"a list of seeds must have one for each of the {n_rows} prompts, got {len(each)}")
    return [seed(one) for one in each]


def stop_ids(value: Any, vocab_size: int) -> frozenset[int]:
    """The token ids that end a row, without those that no model of this vocabulary can choose.

    Raises ValueError where `tokenizer.stop_tokens` is not a collection of whole numbers.
    """
    ids = [_index(token) for token in value] if isinstance(value, Iterable) else [None]
    if None in ids:
        raise ValueError(f"tokenizer.stop_tokens must be a set or list of token ids, got {value!r:.80}")
    return frozenset(token for token in ids if token is not None and 0 <= token < vocab_size)


def batch_sizes(value: Any, max_batch_size: int) -> list[int]:
    """Batch sizes to capture graphs for, None meaning 1 and max_batch_size. Raises ValueError for any out of range."""
    if value is None:
        return sorted({1, max_batch_size})
    sizes = listed("graph_batch_sizes", value)
    return [whole_number("a size in graph_batch_sizes", size, 1, max_batch_size) for size in sizes]


def launches(cuda_graphs: Any, dependent_launch: Any, device_type: str) -> None:
    """How a model launches its kernels. Raises ValueError for what is no bool or None, and for True without a GPU."""
    for name, value in (("cuda_graphs", cuda_graphs), ("dependent_launch", dependent_launch)):
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} must be True, False or None, got {value!r:.80}")
        if value and device_type != "cuda":
            raise ValueError(f"{name} needs a GPU, and the device is {device_type!r}: leave it out")


def listed(name: str, value: Any) -> list[Any]:
    """value as a list. Raises ValueError for a single text and for what cannot be gone through."""
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list, got {value!r:.80}")
    return list(value)


def texts(value: Any) -> list[str]:
    """The prompts of a text completion. Raises ValueError where they are not a list of str."""
    prompts = listed("prompts", value)
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts must be a list of texts, got {prompt!r:.80} at place {place}")
    return prompts


def _index(value: Any) -> int | None:
    """value as an int where it is a whole number of any kind (numpy's and torch's too), never a bool."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _real(name: str, value: Any, below: float | None, expected: str) -> float:
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number >= 0 or (below is not None and number >= below):
        raise ValueError(f"{name} must be {expected}, got {value!r:.80}")
    return number


def prompts(
    prompt_tokens: Sequence[Sequence[int]], *, vocab_size: int, max_batch_size: int, max_seq_len: int
) -> list[list[int]]:
    """The prompts as lists of ints.

    Raises AssertionError, as Meta's generate does, for more prompts than max_batch_size and for one longer than
    max_seq_len; ValueError for no prompts, an empty one, and token ids that are not in the vocabulary.
    """
    try:
        given = [list(prompt) for prompt in prompt_tokens]
    except TypeError:
        raise ValueError(f"prompts must be a list of lists of token ids, got {prompt_tokens!r:.80}") from None
    if not given:
        raise ValueError("there must be at least one prompt, got an empty list")
    if len(given) > max_batch_size:
        raise AssertionError(
            f"{len(given)} prompts are more than the max_batch_size of {max_batch_size}: "
            "pass fewer at a time, or build with a larger max_batch_size"
        )
    return [_prompt(row, prompt, vocab_size, max_seq_len) for row, prompt in enumerate(given)]


def _prompt(row: int, prompt: list[int], vocab_size: int, max_seq_len: int) -> list[int]:
    if not prompt:
        raise ValueError(f"prompt {row} is empty: it must have at least one token (tokenizer.bos_id begins a text)")
    if len(prompt) > max_seq_len:
        raise AssertionError(
            f"prompt {row} has {len(prompt)} tokens, more than the max_seq_len of {max_seq_len}: "
            "shorten it, or build with a larger max_seq_len"
        )
    return [
        whole_number(f"token {place} of prompt {row}", token, 0, vocab_size - 1) for place, token in enumerate(prompt)
    ]


def forward(
    tokens: object, start_pos: object, max_batch_size: int, max_seq_len: int, vocab_size: int
) -> tuple[int, int, int]:
    """(start_pos, rows, length) of tokens (B, S) that are to be run from position start_pos on, where they fit.

    ValueError where they do not, or are no tokens.
    """
    start = whole_number("start_pos", start_pos, 0)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or 0 in tokens.shape or tokens.is_floating_point():
        got = f"{tokens.dtype} of {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be a tensor of integers of shape (B, S), got {got}")
    rows, length = tokens.shape
    if rows > max_batch_size:
        raise ValueError(f"{rows} rows do not fit the cache's max_batch_size of {max_batch_size}")
    last = start + length - 1
    if last >= max_seq_len:
        raise ValueError(f"positions {start} to {last} do not fit the cache's max_seq_len of {max_seq_len}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, got {low if low < 0 else high}")
    return start, rows, length


def some(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message, the first of them where they are many."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
