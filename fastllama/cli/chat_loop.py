"""A conversation that fits its context: what is said, what is answered, and what is forgotten when room runs out."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllama.generation import Llama
    from fastllama.tokenizer import Message

REPLY_SHARE = 4  # a prompt leaves at least this part (one fourth) of the context to the reply ...
REPLY_ROOM = 64  # ... though never more tokens than this


class TooLongError(ValueError):
    """One message alone does not fit the context; the conversation is as it was before."""


@dataclass(frozen=True)
class Reply:
    """What the model said. `finish_reason` is "stop", "length" or "interrupted"."""

    text: str
    n_tokens: int
    finish_reason: str | None
    turns_forgotten: int


class Conversation:
    """A dialog with `llm`, which remembers as many of its latest turns as fit; the system message always stays."""

    def __init__(
        self, llm: "Llama", system: str | None, *, temperature: float, top_p: float, max_gen_len: int | None
    ) -> None:
        self._llm = llm
        self._head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []
        self._temperature = temperature
        self._top_p = top_p
        self._max_gen_len = max_gen_len

    @property
    def messages(self) -> "list[Message]":
        """The dialog as the model sees it next, system message first."""
        return [*self._head, *self._turns]

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self._turns = []

    def say(self, message: str, show: Callable[[str], None] | None = None, interruptible: bool = False) -> Reply:
        """Answer `message`, handing each piece of text to `show` as it comes.

        interruptible: KeyboardInterrupt ends the reply only, and what was said until then stays in the conversation.
        Raises TooLongError when the message alone does not fit.
        """
        turns, forgotten = self._fit([*self._turns, {"role": "user", "content": message}])
        prompt = self._encode(turns)
        length = self._context if self._max_gen_len is None else self._max_gen_len
        text, n_tokens = "", 0
        reason: str | None = None
        # closing: a reply that is broken off leaves nothing running behind.
        stream = self._llm.stream([prompt], length, self._temperature, self._top_p)
        with closing(stream):
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
        # A question that got no answer is not remembered: a turn of nothing would teach the model to say nothing.
        self._turns = [*turns, {"role": "assistant", "content": text}] if text.strip() else turns[:-1]
        return Reply(text, n_tokens, reason, forgotten)

    def _fit(self, turns: "list[Message]") -> "tuple[list[Message], int]":
        """(the latest turns that leave room for a reply, how many messages were dropped)."""
        room = self._context - min(REPLY_ROOM, self._context // REPLY_SHARE)
        kept = turns
        # Two at a time: a dialog goes on with a question, never with the answer to one that is gone.
        while len(kept) > 1 and len(self._encode(kept)) > room:
            kept = kept[2:]
        needed = len(self._encode(kept))
        if needed >= self._context:
            raise TooLongError(
                f"this message and what must go with it are {needed} tokens, and the context has {self._context}: "
                "shorten it, or raise --max_seq_len"
            )
        return kept, len(turns) - len(kept)

    def _encode(self, turns: "list[Message]") -> list[int]:
        return self._llm.formatter.encode_dialog_prompt([*self._head, *turns])

    @property
    def _context(self) -> int:
        return self._llm.model.params.max_seq_len
