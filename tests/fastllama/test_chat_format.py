"""Prompts of conversations against Meta's chat format, and conversations that are refused."""

import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

from fastllama.tokenizer import ChatFormat, Dialog, Message, Tokenizer, check_dialog

USER: Message = {"role": "user", "content": "Hi"}
EOT = 256 + 9


@pytest.fixture(scope="module")
def formatter(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    """A tokenizer whose ids are the bytes, so that prompts are readable."""
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)))
    return ChatFormat(Tokenizer(path))


@pytest.fixture(scope="module")
def real() -> tuple[ChatFormat, MetaChatFormat]:
    import llama_models.llama3.tokenizer as module

    ours = ChatFormat(Tokenizer(Path(module.__file__).parent / "tokenizer.model", llama31=True))
    return ours, MetaChatFormat(MetaTokenizer.get_instance())


def test_prompt_is_the_format_that_llama_3_was_trained_on(formatter: ChatFormat) -> None:
    dialog: Dialog = [
        {"role": "system", "content": " Be brief.\n"},
        USER,
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "\t<|eot_id|> Bye "},
    ]
    prompt = formatter.encode_dialog_prompt(dialog)
    assert formatter.tokenizer.decode(prompt) == (
        "<|begin_of_text|>"
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<|eot_id|> Bye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    # Four messages end with eot. The fifth <|eot_id|> is text from a user.
    assert prompt.count(EOT) == 4


def test_header_and_message_are_parts_of_the_prompt(formatter: ChatFormat) -> None:
    header = formatter.encode_header(USER)
    assert header == [256 + 6, *b"user", 256 + 7, *b"\n\n"]
    assert formatter.encode_message(USER) == [*header, *b"Hi", EOT]


contents = st.text(max_size=40).map(lambda text: text.encode(errors="replace").decode())
messages = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents})


@given(st.lists(messages, min_size=1, max_size=4))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_prompt_matches_meta(real: tuple[ChatFormat, MetaChatFormat], dialog: Any) -> None:
    ours, theirs = real
    raw = [
        # Meta's assistant messages end in end_of_turn only if the stop reason says so.
        RawMessage(**{**message, "content": message["content"].strip()}, **extra)
        for message in dialog
        for extra in [{"stop_reason": "end_of_turn"} if message["role"] == "assistant" else {}]
    ]
    assert ours.encode_dialog_prompt(dialog) == theirs.encode_dialog_prompt(raw).tokens


def test_any_text_is_a_valid_role(formatter: ChatFormat) -> None:
    message: Any = {"role": "ipython", "content": "4"}
    assert formatter.tokenizer.decode(formatter.encode_message(message)).startswith(
        "<|start_header_id|>ipython<|end_header_id|>"
    )


def test_a_tuple_is_a_dialog_too(formatter: ChatFormat) -> None:
    assert formatter.encode_dialog_prompt((USER,)) == formatter.encode_dialog_prompt([USER])


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ([], "^dialog is empty"),
        ((), "^dialog is empty"),
        ("Hi", "^dialog: expected a list of messages, got str"),
        (None, "^dialog: expected a list of messages, got NoneType"),
        (USER, "^dialog: expected a list of messages, got dict"),
        ([USER, "Hi"], "^dialog, message 1: expected a dict"),
        ([USER, [USER]], "^dialog, message 1: expected a dict"),
        ([{"content": "Hi"}], r"^dialog, message 0 has no 'role'; its keys are \['content'\]"),
        ([USER, USER, {"role": "user"}], "^dialog, message 2 has no 'content'"),
        ([{"role": 1, "content": "Hi"}], "^dialog, message 0: 'role' must be a str, got int"),
        ([{"role": "user", "content": None}], "^dialog, message 0: 'content' must be a str, got NoneType"),
        ([{"role": "user", "content": ["Hi"]}], "^dialog, message 0: 'content' must be a str, got list"),
        ([{"role": "", "content": "Hi"}], "^dialog, message 0: 'role' is empty"),
    ],
)
def test_bad_dialogs_are_refused(formatter: ChatFormat, dialog: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formatter.encode_dialog_prompt(dialog)


def test_the_error_has_the_given_name_of_the_dialog() -> None:
    with pytest.raises(ValueError, match=r"^dialog 3, message 0 has no 'content'"):
        check_dialog([{"role": "user"}], "dialog 3")


@pytest.mark.parametrize("method", ["encode_header", "encode_message"])
def test_bad_messages_are_refused(formatter: ChatFormat, method: str) -> None:
    with pytest.raises(ValueError, match=r"^message has no 'content'"):
        getattr(formatter, method)({"role": "user"})
