"""What `text_completion` and `chat_completion` return."""

from collections.abc import Sequence
from typing import TypedDict

from fastllama.tokenizer import Message
from fastllama.tokenizer_base import BaseTokenizer


class CompletionPrediction(TypedDict, total=False):
    """The continuation of one text."""

    generation: str
    tokens: list[str]  # only with logprobs
    logprobs: list[float]  # only with logprobs


class ChatPrediction(TypedDict, total=False):
    """The answer to one dialog."""

    generation: Message
    tokens: list[str]  # only with logprobs
    logprobs: list[float]  # only with logprobs


def add_logprobs(
    predictions: Sequence[CompletionPrediction] | Sequence[ChatPrediction],
    tokenizer: BaseTokenizer,
    tokens: Sequence[Sequence[int]],
    scores: Sequence[list[float]] | None,
) -> None:
    """Add each row's tokens, as texts, and their log-probabilities, if there are any."""
    for prediction, row, row_scores in zip(predictions, tokens, scores or (), strict=False):
        prediction["tokens"] = [tokenizer.decode([token]) for token in row]
        prediction["logprobs"] = row_scores
