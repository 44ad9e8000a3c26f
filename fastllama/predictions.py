"""What `text_completion` and `chat_completion` return."""

from typing import TypedDict

from fastllama.tokenizer import Message


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
