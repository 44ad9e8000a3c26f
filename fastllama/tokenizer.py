"""Llama 3's tokenizer and chat format: converts text to token ids and back, and conversations to prompts.

A Llama 3 tokenizer is a byte-level BPE: byte strings with ranks. A token's rank is its id and its priority: the pair of
adjacent tokens that makes the lowest rank is merged first. tiktoken applies these merges. This module numbers the 256
special tokens that follow the ranks. It cuts long text exactly where Meta's code does, because the cuts change the
tokens.

Special tokens have two sets of names. Llama 3.0 names five of the 256 ids and numbers the others as reserved; Llama 3.1
names ten, including `<|eom_id|>`, and numbers the others again from 0. `Tokenizer` accepts the names of both versions.
If a name means different ids in the two, such as `<|reserved_special_token_2|>`, the tokenizer's own version decides.

`ChatFormat` writes a conversation in Llama 3's format.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypedDict

import tiktoken

from fastllama.tokenizer_base import BaseTokenizer
from fastllama.tokenizer_files import LLAMA30_NAMES, LLAMA31_NAMES, NUM_SPECIAL_TOKENS, read_tokenizer_file

# Meta's limits: tiktoken fails on much longer text, and is quadratic in the length of a run without a word boundary.
MAX_CHUNK_CHARS = 400_000
MAX_RUN_CHARS = 25_000

CHAT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # of ChatFormat

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]


class Tokenizer(BaseTokenizer):
    """Llama 3's tokenizer, read from `tokenizer.model` (a ranks file) or from Hugging Face's `tokenizer.json`.

    Attributes:
        n_words: size of the vocabulary: ranks and special tokens.
        bos_id, eos_id: ids of `<|begin_of_text|>` and `<|end_of_text|>`.
        pad_id: -1; Llama 3 has no padding token.
        stop_tokens: the set of ids that end a generation. It is read at every call, so callers may change it.
        special_tokens: id of every special token, by its 3.0 name and by its 3.1 name.
        llama31: whether special tokens are named, and decoded, as in Llama 3.1.
        model: the tiktoken `Encoding`; it has the special tokens under the names that `decode` writes.
    """

    num_reserved_special_tokens = NUM_SPECIAL_TOKENS

    pat_str = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, model_path: str | os.PathLike[str], *, llama31: bool = False) -> None:
        """Read a ranks file, a `tokenizer.json`, or the first of them in a checkpoint folder.

        `llama31` selects Llama 3.1's names and stop tokens, which include `<|eom_id|>`. A `tokenizer.json` has its own
        names. They replace those of either version, and a name of 3.1 among them sets `llama31`.

        Raises AssertionError if there is no such file, ValueError if it is not a Llama 3 tokenizer.
        """
        file = read_tokenizer_file(model_path, self.pat_str)
        self._file = file
        self.n_words = len(file.ranks) + NUM_SPECIAL_TOKENS
        new_in_31 = set(LLAMA31_NAMES.values()) - set(LLAMA30_NAMES.values())
        self._set_special_tokens(llama31 or not new_in_31.isdisjoint(file.special_names.values()))
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.pad_id = -1
        self.stop_tokens = {self.eos_id, self.special_tokens["<|eot_id|>"]}
        if self.llama31:
            self.stop_tokens.add(self.special_tokens["<|eom_id|>"])

    def use_llama31_names(self) -> None:
        """Decode with Llama 3.1's names from here on, and add `<|eom_id|>` to the stop tokens."""
        if not self.llama31:
            self._set_special_tokens(True)
            self.stop_tokens.add(self.special_tokens["<|eom_id|>"])

    def _set_special_tokens(self, llama31: bool) -> None:
        self.llama31 = llama31
        first_id = len(self._file.ranks)
        own_names = _all_special_names(LLAMA31_NAMES if llama31 else LLAMA30_NAMES, self._file.special_names)
        own = {name: first_id + offset for offset, name in enumerate(own_names)}
        # tiktoken would decode an id with two names to either of them, so it gets only one name per id.
        self.model = tiktoken.Encoding(
            self._file.name, pat_str=self.pat_str, mergeable_ranks=self._file.ranks, special_tokens=own
        )
        self.special_tokens = dict(own)
        for names in (LLAMA31_NAMES, LLAMA30_NAMES):
            for offset, name in enumerate(_all_special_names(names, {})):
                self.special_tokens.setdefault(name, first_id + offset)

    def _pieces(self, s: str) -> Iterator[str]:
        return split_long_text(s)

    def _encode_text(self, s: str, *, is_first: bool) -> list[int]:
        return self.model.encode_ordinary(s)

    def _join(self, ids: list[int]) -> bytes:
        return self.model.decode_bytes(ids)

    def __repr__(self) -> str:
        return f"Tokenizer({self._file.name!r}, n_words={self.n_words}, llama31={self.llama31})"


class ChatFormat:
    """Encodes conversations in the format that Llama 3 was trained on.

    Encoding raises ValueError for a tokenizer without Llama 3's special tokens: its model has another format.
    """

    name = "llama3"

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_header(self, message: Message) -> list[int]:
        """The header of a message: start_header, the role, end_header, and an empty line."""
        check_message(message)
        special = self.tokenizer.special_tokens
        if missing := [name for name in CHAT_TOKENS if name not in special]:
            raise ValueError(
                f"the tokenizer has no {missing[0]}, so this model was not trained on Llama 3's chat format: complete "
                "texts with it (text_completion, fastllama complete)"
            )
        return [
            special["<|start_header_id|>"],
            *self.tokenizer.encode(message["role"], bos=False, eos=False),
            special["<|end_header_id|>"],
            *self.tokenizer.encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> list[int]:
        """The header, the content without surrounding white space, and eot."""
        return [
            *self.encode_header(message),
            *self.tokenizer.encode(message["content"].strip(), bos=False, eos=False),
            self.tokenizer.special_tokens["<|eot_id|>"],
        ]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """begin_of_text, every message, and the header of the assistant's next message.

        Raises ValueError, as `check_dialog` does, if `dialog` is not a dialog.
        """
        check_dialog(dialog)
        tokens = [token for message in dialog for token in self.encode_message(message)]
        begin = self.tokenizer.special_tokens["<|begin_of_text|>"]
        return [begin, *tokens, *self.encode_header({"role": "assistant", "content": ""})]


def check_dialog(dialog: object, name: str = "dialog", *, may_call: bool = False) -> None:
    """Raise ValueError unless `dialog` is a non-empty sequence of messages. The error calls it `name`.

    may_call: a message with tool_calls needs no content.
    """
    if not isinstance(dialog, Sequence) or isinstance(dialog, str | bytes):
        raise ValueError(f"{name}: expected a list of messages, got {type(dialog).__name__}")
    if not dialog:
        raise ValueError(f"{name} is empty; it needs at least one message, such as {{'role': 'user', 'content': 'Hi'}}")
    for index, message in enumerate(dialog):
        check_message(message, f"{name}, message {index}", may_call=may_call)


def check_message(message: object, name: str = "message", *, may_call: bool = False) -> None:
    """Raise ValueError unless `message` has a role (any non-empty text) and a content. The error calls it `name`.

    may_call: a message with tool_calls needs no content.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"{name}: expected a dict with 'role' and 'content', got {type(message).__name__}")
    is_call = may_call and bool(message.get("tool_calls")) and message.get("content") is None
    for key in ("role",) if is_call else ("role", "content"):
        if key not in message:
            raise ValueError(f"{name} has no {key!r}; its keys are {sorted(map(str, message))}")
        if not isinstance(message[key], str):
            raise ValueError(f"{name}: {key!r} must be a str, got {type(message[key]).__name__}")
    if not message["role"]:
        raise ValueError(f"{name}: 'role' is empty; expected 'system', 'user' or 'assistant'")


def split_long_text(s: str) -> Iterator[str]:
    """The pieces of a text that are encoded separately, cut where Meta's code cuts.

    Cuts the text every `MAX_CHUNK_CHARS`, and in each chunk every `MAX_RUN_CHARS` of a run of white space or of other
    characters.
    """
    for start in range(0, len(s), MAX_CHUNK_CHARS):
        chunk = s[start : start + MAX_CHUNK_CHARS]
        begin = 0
        for run in re.finditer(r"\s+|\S+", chunk):
            for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


def _all_special_names(version_names: Mapping[int, str], names_in_file: Mapping[int, str]) -> list[str]:
    """The names of all special tokens, in the order of their ids.

    Ids without a name in `version_names` are numbered as reserved. A file's own names replace both.
    """
    reserved = (f"<|reserved_special_token_{count}|>" for count in itertools.count())
    names = [version_names.get(offset) or next(reserved) for offset in range(NUM_SPECIAL_TOKENS)]
    # A file that does not name an id may have given that id's usual name to another id.
    taken = set(names_in_file.values())
    names = [f"<|unnamed_special_token_{offset}|>" if name in taken else name for offset, name in enumerate(names)]
    return [names_in_file.get(offset, name) for offset, name in enumerate(names)]
