"""Checks of the arguments of public calls, made before any work. Error messages say what to do."""

import contextlib
import math
import operator
from collections import UserString
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from fastllama.kernels.guesses import MAX_GUESSES

TEXTS = str | UserString | bytes | bytearray | memoryview
UNORDERED = AbstractSet | Mapping
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LEAST_SEED, MOST_SEED = -(2**63), 2**64 - 1  # the range of torch.manual_seed


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """value as an int. Raises ValueError unless it is a whole number from `least` to `most`."""
    number = _as_int(value)
    if number is None or number < least or (most is not None and number > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {wanted}, got {value!r}")
    return number


def temperature(value: Any) -> float:
    """value as a float. Raises ValueError if it is negative, infinite or not a number."""
    return _real("temperature", value, math.inf, "0 (the most likely token) or a positive number")


def top_p(value: Any) -> float:
    """value as a float, at most 1. Raises ValueError if it is negative or not a number."""
    number = _real("top_p", value, None, "a number from 0 (the most likely token) to 1 (the whole vocabulary)")
    return min(number, 1.0)


def seed(value: Any) -> int:
    """value as an unsigned 64-bit seed. Raises ValueError unless it is an integer that torch.manual_seed accepts."""
    return whole_number("a seed", value, LEAST_SEED, MOST_SEED) % 2**64


def seeds(value: Any, n_rows: int) -> list[int] | int | None:
    """A call's seeds: one for all rows, a list with one per row, or None. Raises ValueError for anything else."""
    if value is None or _as_int(value) is not None:
        return None if value is None else seed(value)
    if isinstance(value, TEXTS | UNORDERED) or getattr(value, "ndim", None) == 0 or not isinstance(value, Iterable):
        return seed(value)  # raises, and says what a seed must be
    values = list(value)
    if len(values) != n_rows:
        raise ValueError(f"a list of seeds must have one for each of the {n_rows} prompts, got {len(values)}")
    return [seed(item) for item in values]


def flag(name: str, value: Any) -> bool:
    """value as a bool. Raises ValueError for a text ("False" would be true) and for a value without a truth value."""
    try:
        if not isinstance(value, TEXTS):
            return bool(value)
    except Exception:  # libraries raise different errors for an array of several values, or one without values
        pass
    raise ValueError(f"{name} must be True or False, got {kind(value)}")


def stop_ids(value: Any, vocab_size: int) -> frozenset[int]:
    """The token ids that end a row, without those outside the vocabulary.

    Raises ValueError unless `tokenizer.stop_tokens` is a collection of whole numbers.
    """
    fits = isinstance(value, Collection) and not isinstance(value, TEXTS | Mapping)
    ids = [_as_int(token) for token in value] if fits and getattr(value, "ndim", None) != 0 else [None]
    if None in ids:
        raise ValueError(f"tokenizer.stop_tokens must be a set or list of token ids, got {value!r:.80}")
    return frozenset(token for token in ids if token is not None and 0 <= token < vocab_size)


def batch_sizes(value: Any, max_batch_size: int) -> list[int]:
    """Batch sizes to capture graphs for; None means 1 and max_batch_size. Raises ValueError for a size out of range."""
    if value is None:
        return sorted({1, max_batch_size})
    sizes = listed("graph_batch_sizes", value)
    return [whole_number("a size in graph_batch_sizes", size, 1, max_batch_size) for size in sizes]


def speculation(speculate: Any, n_guesses: Any, has_draft: bool) -> tuple[str | None, int | None]:
    """(where guesses come from, how many a step checks), None for "auto"; a draft model alone means "draft".

    Raises ValueError for other values, and for options that contradict each other.
    """
    kind = "draft" if speculate is None and has_draft else speculate
    if kind not in (None, "lookup", "draft"):
        raise ValueError(f'speculate must be "lookup", "draft" or None, got {speculate!r:.80}')
    if kind == "draft" and not has_draft:
        raise ValueError('speculate="draft" needs a draft model: name its checkpoint in draft, or use "lookup"')
    if kind == "lookup" and has_draft:
        raise ValueError('speculate="lookup" uses no draft model: leave draft out, or use speculate="draft"')
    if isinstance(n_guesses, str) and n_guesses == "auto":
        return kind, None
    number = _as_int(n_guesses)
    if number is None or not 1 <= number <= MAX_GUESSES:
        raise ValueError(f'n_guesses must be "auto" or a whole number from 1 to {MAX_GUESSES}, got {n_guesses!r:.80}')
    if kind is None:
        raise ValueError(f'n_guesses={number} needs speculate="lookup", or a draft model')
    return kind, number


def launches(cuda_graphs: Any, dependent_launch: Any, device_type: str) -> None:
    """Check the launch options. Raises ValueError unless each is a bool or None, and for True without a GPU."""
    for name, value in (("cuda_graphs", cuda_graphs), ("dependent_launch", dependent_launch)):
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} must be True, False or None, got {value!r:.80}")
        if value and device_type != "cuda":
            raise ValueError(f"{name} needs a GPU, and the device is {device_type!r}: leave it out")


def listed(name: str, value: Any) -> list[Any]:
    """value as a list. Raises ValueError for a text, a mapping, and a value that is not iterable."""
    if isinstance(value, TEXTS | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list, got {kind(value)}")
    return list(value)


def texts(value: Any) -> list[str]:
    """The prompts of a text completion. Raises ValueError unless they are a list of str."""
    if isinstance(value, TEXTS | UNORDERED) or not isinstance(value, Iterable):
        hint = ": for one text pass [text]" if isinstance(value, str) else _hint(value)
        raise ValueError(f"prompts must be a list of texts, got {kind(value)}{hint}")
    given = list(value)
    for index, prompt in enumerate(given):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts must be a list of texts, got {kind(prompt)} at index {index}")
    return given


def dialogs(value: Any) -> list[Any]:
    """Dialogs as a list. Raises ValueError if they are not a list, or if they are a single dialog."""
    if isinstance(value, TEXTS | UNORDERED) or not isinstance(value, Iterable):
        raise ValueError(f"dialogs must be a list of dialogs, got {kind(value)}")
    given = list(value)
    if given and isinstance(given[0], Mapping):
        raise ValueError(
            f"dialog 0 must be a list of messages, got {kind(given[0])}: for one dialog pass [dialog], a list of it"
        )
    return given


def kind(value: Any) -> str:
    """A short description of a value for an error message: its type and contents; for an array, its shape and dtype."""
    name = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{name} of shape {tuple(value.shape)} and {value.dtype}"
    shown = f"{value!r:.60}"
    if value is None or isinstance(value, bool | int | float):
        return shown
    return name if shown.startswith("<") else f"{name} ({shown})"


def _hint(value: Any) -> str:
    """What to pass instead of a value of this type, as the end of an error message."""
    if isinstance(value, str | UserString):
        return ": encode it first, tokenizer.encode(text, bos=True, eos=False), or call text_completion"
    if isinstance(value, TEXTS):
        return ": decode it to a str and encode that, tokenizer.encode(text, bos=True, eos=False)"
    if isinstance(value, UNORDERED | Iterator):
        return ": make it a list, in the order of the text"
    return ""


def _as_int(value: Any) -> int | None:
    """value as an int; None unless it is a whole number of any library (numpy, torch). A bool is none."""
    if isinstance(value, bool) or _ndim(value) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except Exception:  # a TypeError, or a library's error for a tensor without values
        return None


def _ndim(value: Any) -> int:
    """The number of dimensions of an array, 0 for any other value."""
    return int(getattr(value, "ndim", 0))


def real(name: str, value: Any, least: float, most: float) -> float:
    """value as a float. Raises ValueError unless it is a number from `least` to `most`."""
    number = _as_float(value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r:.80}")
    return number


def _as_float(value: Any) -> float:
    """value as a float, NaN if it is no number."""
    if not isinstance(value, bool | TEXTS) and not _ndim(value):
        with contextlib.suppress(Exception):  # as in _as_int
            return float(value)
    return math.nan


def _real(name: str, value: Any, below: float | None, expected: str) -> float:
    number = _as_float(value)
    if not number >= 0 or (below is not None and number >= below):
        raise ValueError(f"{name} must be {expected}, got {value!r:.80}")
    return number


def prompts(
    prompt_tokens: Sequence[Sequence[int]], *, vocab_size: int, max_batch_size: int, max_seq_len: int
) -> list[list[int]]:
    """The prompts as lists of ints.

    Raises AssertionError, as Meta's generate does, for more prompts than max_batch_size and for a prompt longer than
    max_seq_len. Raises ValueError for no prompts, an empty prompt, anything that is not a list of lists of whole
    numbers, and token ids that are not in the vocabulary.
    """
    given = _as_list(prompt_tokens)
    if given is None:
        raise ValueError(
            f"prompts must be a list of lists of token ids, got {kind(prompt_tokens)}{_hint(prompt_tokens)}"
        )
    if not given:
        raise ValueError("there must be at least one prompt, got an empty list")
    if len(given) > max_batch_size and _as_int(given[0]) is None:
        raise AssertionError(
            f"{len(given)} prompts are more than the max_batch_size of {max_batch_size}: "
            "pass fewer at a time, or build with a larger max_batch_size"
        )
    return [_prompt(row, prompt, vocab_size, max_seq_len) for row, prompt in enumerate(given)]


def _prompt(row: int, prompt: Any, vocab_size: int, max_seq_len: int) -> list[int]:
    tokens = _as_list(prompt)
    if tokens is None:
        hint = ": prompts are a list of lists, also for one prompt" if _as_int(prompt) is not None else ""
        raise ValueError(f"prompt {row} must be a list of token ids, got {kind(prompt)}{hint or _hint(prompt)}")
    if not tokens:
        raise ValueError(f"prompt {row} is empty: it must have at least one token (tokenizer.bos_id begins a text)")
    if len(tokens) > max_seq_len:
        raise AssertionError(
            f"prompt {row} has {len(tokens)} tokens, more than the max_seq_len of {max_seq_len}: "
            "shorten it, or build with a larger max_seq_len"
        )
    if all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        return tokens
    if isinstance(tokens[0], float | bool | list) and hasattr(prompt, "dtype"):
        raise ValueError(f"prompt {row} must be token ids, whole numbers in one dimension, got {kind(prompt)}")
    return [
        whole_number(f"token {place} of prompt {row}", token, 0, vocab_size - 1) for place, token in enumerate(tokens)
    ]


def _as_list(value: Any) -> list[Any] | None:
    """The items of a list, another sequence or an array; None for any other value and for unordered collections."""
    if isinstance(value, TEXTS | UNORDERED) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return None
    try:
        # An array's tolist() returns Python numbers, and is far faster than iterating.
        items = value.tolist() if hasattr(value, "tolist") else list(value)
    except Exception:  # libraries raise different errors for a tensor without values
        return None
    return items if isinstance(items, list) else None


def forward(
    tokens: object, start_pos: object, max_batch_size: int, max_seq_len: int, vocab_size: int
) -> tuple[int, int, int]:
    """(start_pos, rows, length) for a forward pass of tokens (B, S) from position start_pos.

    Raises ValueError if they do not fit the cache, or are not token ids.
    """
    start = whole_number("start_pos", start_pos, 0)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype not in INTEGERS:
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


def first_names(names: Iterable[str], limit: int = 8) -> str:
    """The first names of a list, and the number of the others, for an error message."""
    given = list(names)
    more = f" and {len(given) - limit} more" if len(given) > limit else ""
    return ", ".join(given[:limit]) + more
