"""Measures a model on a text: its perplexity, and how far its predictions are from those of another model.

The text is cut into windows that are independent of each other. Each begins with the token for the begin of a text, if
the tokenizer has one, and all tokens but the first are predicted from those before them. For next-token distributions p
of the reference and q of the model, the divergence at a position is

    KL(p ‖ q) = Σ p · (ln p - ln q)     in nats, 0 for equal predictions
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastllama.generation import Llama
from fastllama.tokenizer_base import BaseTokenizer

PIECE_TOKENS = 128  # whose logits are in memory at once
LARGE_DIVERGENCE = 0.99  # quantile
MAX_CHARACTERS = 64  # of a token; a longer one is a run of blanks
LARGEST_LOGIT = 1e37  # differences and sums of such are still finite in float32


@dataclass(frozen=True)
class Difference:
    """A model's predictions compared with those of a reference.

    reference_perplexity: of the reference. mean_divergence, large_divergence: the mean and the 99th percentile of the
    Kullback–Leibler divergence over all positions, in nats. same_top: the share of positions at which both find the
    same token likeliest.
    """

    reference_perplexity: float
    mean_divergence: float
    large_divergence: float
    same_top: float


@dataclass(frozen=True)
class Quality:
    """The result of `measure_quality`.

    n_tokens: predicted tokens. perplexity: inf if no float holds it, as of a broken model. difference: None without a
    reference.
    """

    n_tokens: int
    perplexity: float
    difference: Difference | None


def windows_of(
    tokenizer: BaseTokenizer, text: str, window_tokens: int, max_tokens: int | None = None
) -> list[list[int]]:
    """The text's tokens in windows of at most `window_tokens`, the begin of text included; max_tokens of it at most.

    ValueError for a text of too few tokens to predict one: of none, or of one without a token for the begin.
    """
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    if max_tokens is not None:  # a long text need not be encoded to its end
        text = text[: max_tokens * MAX_CHARACTERS]
    tokens = tokenizer.encode(text, bos=False, eos=False)[:max_tokens]
    step = window_tokens - len(begin)
    windows = [begin + tokens[start : start + step] for start in range(0, len(tokens), step)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError(
            f"the text has {len(tokens)} tokens: expected at least {2 - len(begin)}, to predict one from what is before"
        )
    return windows


def check_same_windows(windows: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> None:
    """Raise ValueError, which names the first difference, unless two tokenizers made the same windows of a text."""
    for number, (window, other) in enumerate(zip_longest(windows, others, fillvalue=()), 1):
        for place, (ours, theirs) in enumerate(zip_longest(window, other, fillvalue="missing"), 1):
            if ours != theirs:
                raise ValueError(
                    f"the tokenizers differ, so predictions cannot be compared: token {place} of window {number} is "
                    f"{ours}, and {theirs} in the checkpoint to compare with; compare models of one tokenizer"
                )


@torch.inference_mode()
def measure_quality(
    llm: Llama, windows: Sequence[Sequence[int]], reference: Llama | None = None, progress: bool | None = None
) -> Quality:
    """Measure a model on windows of tokens, and against a reference of the same vocabulary if one is given.

    progress: None shows a bar if stderr is a terminal, True always, False never. ValueError if the vocabularies differ,
    or if a model computes logits that are not finite or beyond ±1e37.
    """
    if reference is not None and reference.model.vocab_size != llm.model.vocab_size:
        raise ValueError(
            f"the models have vocabularies of {llm.model.vocab_size} and {reference.model.vocab_size} tokens: compare "
            "models with the same one"
        )
    loss = reference_loss = 0.0
    divergences: list[Tensor] = []
    same = n_tokens = 0
    hidden = None if progress is None else not progress
    for window in tqdm(windows, desc="measuring", unit="window", disable=hidden):
        for begin, targets in _pieces(window):
            ours = _log_probabilities(llm, window, begin, len(targets))
            loss -= float(ours.gather(1, targets[:, None].to(ours.device)).double().sum())
            n_tokens += len(targets)
            if reference is None:
                continue
            theirs = _log_probabilities(reference, window, begin, len(targets)).to(ours.device)
            reference_loss -= float(theirs.gather(1, targets[:, None].to(ours.device)).double().sum())
            divergences.append((theirs.exp() * (theirs - ours)).sum(-1).cpu())
            same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
    difference = None
    if reference is not None:
        every = torch.cat(divergences).double()
        difference = Difference(
            reference_perplexity=_exp(reference_loss / n_tokens),
            mean_divergence=float(every.mean()),
            large_divergence=float(np.quantile(every.numpy(), LARGE_DIVERGENCE)),
            same_top=same / n_tokens,
        )
    return Quality(n_tokens, _exp(loss / n_tokens), difference)


def _exp(mean_loss: float) -> float:
    """The perplexity; inf beyond the largest float."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def _pieces(window: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """(position of the first token, the tokens that follow each) of every piece of a window."""
    for begin in range(0, len(window) - 1, PIECE_TOKENS):
        end = min(begin + PIECE_TOKENS, len(window) - 1)
        yield begin, torch.tensor(window[begin + 1 : end + 1])


def _log_probabilities(llm: Llama, window: Sequence[int], begin: int, length: int) -> Tensor:
    """float32 log-probabilities (length, V) of the tokens after those at `begin` and on."""
    tokens = torch.tensor([window[begin : begin + length]], device=llm.model.device)
    logits = llm.model.forward(tokens, begin)[0]
    if not bool((logits.abs() <= LARGEST_LOGIT).all()):  # not true of nan
        raise ValueError(
            f"the logits after token {begin} of a window are not finite, or beyond ±{LARGEST_LOGIT:.0e}: the weights "
            "are damaged"
        )
    return torch.log_softmax(logits, -1)
