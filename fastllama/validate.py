"""What a caller may pass: every argument's value is checked before any work, and the message says what to do."""

import math
import operator
from collections.abc import Collection, Sequence

SEED_RANGE = (-(2**63), 2**64 - 1)  # what torch.manual_seed takes


def whole_number(name: str, value: object, least: int) -> int:
    """value as an int. Raises ValueError where it is not a whole number of at least `least`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if isinstance(value, bool) or number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def temperature(value: object) -> float:
    """value as a float. Raises ValueError where it is negative, infinite or not a number."""
    return _real("temperature", value, "0 (the most likely token) or a positive number")


def top_p(value: object) -> float:
    """value as a float. Raises ValueError where it is negative, infinite or not a number."""
    return _real("top_p", value, "a number from 0 (the most likely token) to 1 (the whole vocabulary)")


def _real(name: str, value: object, expected: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool | str) or not 0 <= number < math.inf:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return number


def seed(value: object) -> int:
    """value as an unsigned 64-bit seed. Raises ValueError where it is no integer that torch.manual_seed would take."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if isinstance(value, bool) or number is None or not SEED_RANGE[0] <= number <= SEED_RANGE[1]:
        raise ValueError(f"a seed must be a whole number from -2**63 to 2**64 - 1, got {value!r}")
    return number % 2**64


def seeds(value: object, n_rows: int) -> list[int] | int | None:
    """A call's seed: one, one per row, or None. Raises ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, Collection) and not isinstance(value, str | bytes):
        listed = list(value)
        if len(listed) != n_rows:
            raise ValueError(f"a list of seeds must have one for each of the {n_rows} prompts, got {len(listed)}")
        return [seed(one) for one in listed]
    return seed(value)


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
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(f"prompt {row} must hold token ids (integers), got {prompt!r:.80}") from None
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {place} of prompt {row} must be from 0 to {vocab_size - 1}, got {token}")
    return ids
