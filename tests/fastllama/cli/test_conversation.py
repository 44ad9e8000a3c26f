"""Conversations longer than the context, with a scripted model that has one token per character."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fastllama import Llama
from fastllama.cli.conversation import Conversation, TooLongError
from fastllama.stream import Increment

FRAME = 2  # tokens around each message
CONTEXT = 100


class ScriptedLlama:
    """Returns `replies` one after the other; None among a reply's pieces stands for a Ctrl-C."""

    speculation = None

    def __init__(self, *replies: Sequence[str | None]) -> None:
        self.replies = list(replies)
        self.model = SimpleNamespace(params=SimpleNamespace(max_seq_len=CONTEXT))
        self.formatter = self
        self.open_streams = 0
        self.calls: list[tuple[Any, ...]] = []

    def encode_dialog_prompt(self, dialog: Sequence[dict[str, str]]) -> list[int]:
        return [0] * sum(FRAME + len(message["content"]) for message in dialog)

    def stream(
        self, prompts: list[list[int]], max_gen_len: int, temperature: float, top_p: float, *, reuse_prefix: bool
    ) -> Iterator[Increment]:
        assert reuse_prefix, "the earlier turns are computed again"
        self.calls.append((len(prompts[0]), max_gen_len, temperature, top_p))
        self.open_streams += 1
        try:
            for piece in self.replies.pop(0):
                if piece is None:
                    raise KeyboardInterrupt
                yield Increment(0, [1] * len(piece), piece, None, None)
            yield Increment(0, [], "", None, "stop")
        finally:
            self.open_streams -= 1


def conversation(llm: ScriptedLlama, system: str | None = None) -> Conversation:
    return Conversation(cast(Llama, llm), system, temperature=0.5, top_p=0.8, max_gen_len=None)


def contents(talk: Conversation) -> list[str]:
    return [message["content"] for message in talk.messages]


def test_send_shows_pieces_and_remembers_them() -> None:
    llm = ScriptedLlama(["he", "llo"], ["bye"])
    talk = conversation(llm, "be kind")
    shown: list[str] = []
    reply = talk.send("hi", shown.append)
    assert (reply.text, reply.n_tokens, reply.finish_reason, reply.n_forgotten) == ("hello", 5, "stop", 0)
    assert shown == ["he", "llo", ""]
    talk.send("bye")
    assert contents(talk) == ["be kind", "hi", "hello", "bye", "bye"]
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert llm.calls[0] == (2 * FRAME + 9, CONTEXT, 0.5, 0.8)


def test_send_forgets_the_oldest_exchange_and_keeps_the_system_message() -> None:
    talk = conversation(ScriptedLlama(["a" * 15], ["b" * 20], ["c"]), "system")
    assert talk.send("1" * 25).n_forgotten == 0
    assert talk.send("2" * 10).n_forgotten == 0  # 8 + 27 + 17 + 12 leave a quarter free
    # The first answer would fit without its question, and is dropped with it.
    assert talk.send("3" * 10).n_forgotten == 2
    assert contents(talk) == ["system", "2" * 10, "b" * 20, "3" * 10, "c"]


def test_send_forgets_everything_older_for_a_long_message() -> None:
    talk = conversation(ScriptedLlama(["a"], ["b"], ["c"]))
    talk.send("1")
    talk.send("2")
    assert talk.send("x" * 80).n_forgotten == 4  # less than a fourth is left for the reply, and still it fits
    assert contents(talk) == ["x" * 80, "c"]


def test_send_refuses_a_message_that_never_fits_and_changes_nothing() -> None:
    llm = ScriptedLlama(["a"], ["b"])
    talk = conversation(llm)
    talk.send("1")
    before = talk.messages
    with pytest.raises(
        TooLongError, match=r"a prompt of 100 tokens, and the context has 100: shorten it, or raise --max_seq_len"
    ):
        talk.send("x" * (CONTEXT - FRAME))
    assert talk.messages == before and len(llm.calls) == 1
    assert talk.send("2").text == "b"


def test_interrupt_ends_only_the_reply_and_keeps_its_text() -> None:
    llm = ScriptedLlama(["par", None], ["next"])
    talk = conversation(llm)
    reply = talk.send("hi", interruptible=True)
    assert (reply.text, reply.finish_reason) == ("par", "interrupted")
    assert llm.open_streams == 0
    assert talk.send("go on").text == "next"
    assert contents(talk) == ["hi", "par", "go on", "next"]


def test_interrupt_while_showing_closes_the_stream() -> None:
    llm = ScriptedLlama(["one", "two"])

    def show(text: str) -> None:
        raise KeyboardInterrupt

    reply = conversation(llm).send("hi", show, interruptible=True)
    assert (reply.text, reply.finish_reason, llm.open_streams) == ("one", "interrupted", 0)


def test_interrupt_without_a_terminal_ends_the_chat() -> None:
    llm = ScriptedLlama(["par", None])
    with pytest.raises(KeyboardInterrupt):
        conversation(llm).send("hi")
    assert llm.open_streams == 0


def test_question_without_an_answer_is_not_remembered() -> None:
    talk = conversation(ScriptedLlama([None], []))
    talk.send("hi", interruptible=True)
    assert talk.messages == []
    assert talk.send("hi").text == "" and talk.messages == []


def test_reset_keeps_the_system_message() -> None:
    talk = conversation(ScriptedLlama(["a"]), "system")
    talk.send("1")
    talk.reset()
    assert contents(talk) == ["system"]
