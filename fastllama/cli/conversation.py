"""A conversation that fits the model's context: the oldest messages are forgotten when the context is full."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllama.generation import Llama
    from fastllama.speculation_stats import SpeculationStats
    from fastllama.tokenizer import Message

# A prompt leaves a fourth of the context for the reply, but at most 64 tokens.
REPLY_CONTEXT_DIVISOR = 4
MAX_RESERVED_REPLY_TOKENS = 64


class TooLongError(ValueError):
    """A message alone does not fit the context. The conversation is unchanged."""


@dataclass(frozen=True)
class Reply:
    """The model's reply. `finish_reason` is "stop", "length" or "interrupted"."""

    text: str
    n_tokens: int
    finish_reason: str | None
    n_forgotten: int  # messages that were dropped from the conversation before this reply
    speculation: "SpeculationStats | None" = None  # what it did for this reply


class Conversation:
    """A dialog with `llm`. It keeps as many of the latest messages as fit, and always the system message."""

    def __init__(
        self, llm: "Llama", system: str | None, *, temperature: float, top_p: float, max_gen_len: int | None
    ) -> None:
        self._llm = llm
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []
        self._temperature = temperature
        self._top_p = top_p
        self._max_gen_len = max_gen_len

    @property
    def messages(self) -> "list[Message]":
        """The dialog of the next prompt, system message first."""
        return [*self._system, *self._turns]

    def reset(self) -> None:
        """Forget all messages except the system message."""
        self._turns = []

    def send(self, message: str, show: Callable[[str], None] | None = None, interruptible: bool = False) -> Reply:
        """Generate the reply to `message`, and call `show` with each piece of its text.

        interruptible: KeyboardInterrupt ends only the reply, and its text so far stays in the conversation.
        Raises TooLongError if the message alone does not fit.
        """
        turns, n_forgotten = self._fit([*self._turns, {"role": "user", "content": message}])
        prompt = self._encode(turns)
        length = self._context if self._max_gen_len is None else self._max_gen_len
        text, n_tokens, before = "", 0, self._llm.speculation
        reason: str | None = None
        stream = self._llm.stream([prompt], length, self._temperature, self._top_p, reuse_prefix=True)
        with closing(stream):  # an interrupted stream must not stay open
            try:
                for increment in stream:
                    text += increment.text
                    n_tokens += len(increment.tokens)
                    reason = increment.finish_reason or reason
                    if show is not None:
                        show(increment.text)
            except KeyboardInterrupt:
                if not interruptible:
                    raise
                reason = "interrupted"
        # A question without a reply is forgotten: an empty turn would lead the model to more empty replies.
        self._turns = [*turns, {"role": "assistant", "content": text}] if text.strip() else turns[:-1]
        after = self._llm.speculation
        speculation = None if after is None or before is None else after - before
        return Reply(text, n_tokens, reason, n_forgotten, speculation)

    def _fit(self, turns: "list[Message]") -> "tuple[list[Message], int]":
        """(the latest turns that leave space for a reply, the number of messages dropped)."""
        reserved = min(MAX_RESERVED_REPLY_TOKENS, self._context // REPLY_CONTEXT_DIVISOR)
        latest = turns
        # Drops a question and its answer together, so that the dialog starts with a question.
        while len(latest) > 1 and len(self._encode(latest)) > self._context - reserved:
            latest = latest[2:]
        n_tokens = len(self._encode(latest))
        if n_tokens >= self._context:
            raise TooLongError(
                f"this message with the system message makes a prompt of {n_tokens} tokens, and the context has "
                f"{self._context}: shorten it, or raise --max_seq_len"
            )
        return latest, len(turns) - len(latest)

    def _encode(self, turns: "list[Message]") -> list[int]:
        return self._llm.formatter.encode_dialog_prompt([*self._system, *turns])

    @property
    def _context(self) -> int:
        return self._llm.model.params.max_seq_len
