"""What all tokenizers have in common: Meta's interface, special tokens in text, and text as tokens are generated.

A tokenizer decodes each token to bytes of its own, whatever its neighbours are. So decoded text can be streamed: bytes
are joined, and characters are returned when they are complete.
"""

import codecs
import functools
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Literal

DEFAULT_TEMPLATE = "default"  # the name of the usual chat template
NO_TOKEN_ID = -1  # of a special token that a tokenizer does not have


class BaseTokenizer(ABC):
    """A tokenizer with the interface of Meta's.

    Attributes:
        n_words: size of the vocabulary.
        bos_id, eos_id, pad_id: ids of the tokens for begin and end of a text, and for padding; -1 for none.
        stop_tokens: the set of ids that end a generation. It is read at every call, so callers may change it.
        special_tokens: id of every special token by name.
        named_tokens: the text of special tokens by their role, such as bos_token, where a file states it.
        chat_templates: the chat templates that came in one file with the tokenizer, by name; "default" is the usual.
        n_rows: ids from n_words to n_rows - 1 have no token and decode to nothing.
    """

    n_words: int
    bos_id: int
    eos_id: int
    pad_id: int
    stop_tokens: set[int]
    special_tokens: dict[str, int]
    named_tokens: Mapping[str, str] = MappingProxyType({})
    chat_templates: Mapping[str, str] = MappingProxyType({})
    n_rows: int = 0
    strips_space = False  # whether decoding removes one space from the beginning of a text

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Token ids of `s`, with the token for the begin of a text before (`bos`) and that for its end after (`eos`).

        The name of a special token is plain text unless it is in `allowed_special`, so a user's text never becomes a
        control token. "all" allows every name in `special_tokens`, or disallows every name that is not allowed. A lone
        surrogate is encoded as U+FFFD, a pair of surrogates as its character.

        Raises AssertionError if `s` is not a str, ValueError if it holds a name in `disallowed_special`.
        """
        if not isinstance(s, str):
            raise AssertionError(f"encode takes one str, got {type(s).__name__}; encode each text of a list by itself")
        known = frozenset(self.special_tokens)
        allowed = known if allowed_special == "all" else _name_set(allowed_special, "allowed_special")
        forbidden = (
            known - allowed if disallowed_special == "all" else _name_set(disallowed_special, "disallowed_special")
        )
        pieces: list[tuple[str, bool]] = []
        for piece in self._pieces(s):
            if match := pattern_of(forbidden).search(piece):
                raise ValueError(
                    f"the text holds the special token {match[0]!r}, which disallowed_special forbids; pass "
                    "disallowed_special=() to encode it as plain text, or allow it in allowed_special"
                )
            start = 0
            for special in pattern_of(allowed & known).finditer(piece):
                pieces += [(piece[start : special.start()], False), (special[0], True)]
                start = special.end()
            pieces.append((piece[start:], False))
        tokens = self.encode_pieces(pieces)
        return (self._begin() if bos else []) + tokens + (self._end() if eos else [])

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of a text in pieces, each with whether it is the name of a special token or plain text."""
        parts = [piece for piece in pieces if piece[0]]
        tokens: list[int] = []
        for number, (part, is_special) in enumerate(parts):
            if is_special:
                tokens.append(self.special_tokens[part])
                continue
            if number > 0 and parts[number - 1][1] and self._strips_around(parts[number - 1][0])[1]:
                part = part.lstrip()
            if number + 1 < len(parts) and parts[number + 1][1] and self._strips_around(parts[number + 1][0])[0]:
                part = part.rstrip()
            tokens += self._encode_text(part, is_first=number == 0)
        return tokens

    def decode(self, t: Sequence[int]) -> str:
        """Text of the ids: special tokens by name, U+FFFD for invalid UTF-8. Raises as `decode_bytes`."""
        text = self.decode_bytes(t).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_space else text

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """The ids' bytes, joined. Raises ValueError unless `t` is a sequence of ids of this tokenizer."""
        if isinstance(t, str | bytes | bytearray | memoryview | AbstractSet | Mapping):
            raise ValueError(f"decode takes a sequence of token ids, got {t!r:.80}, a {type(t).__name__}")
        try:
            ids = [operator.index(token) for token in t]
        except TypeError as error:
            raise ValueError(f"decode takes a sequence of token ids, got {t!r:.80}: {error}") from None
        size = max(self.n_words, self.n_rows)
        for position, token in enumerate(ids):
            if not 0 <= token < size:
                raise ValueError(f"token id {token} at position {position} is outside the vocabulary, 0 to {size - 1}")
        return self._join([token for token in ids if token < self.n_words])

    def _begin(self) -> list[int]:
        """The tokens with which this tokenizer begins a text."""
        return [self.bos_id]

    def _end(self) -> list[int]:
        return [self.eos_id]

    def _strips_around(self, name: str) -> tuple[bool, bool]:
        """Whether a special token takes in the white space before it, and after it."""
        return False, False

    def _pieces(self, s: str) -> Iterator[str]:
        """The pieces of a text that are encoded separately."""
        yield s

    @abstractmethod
    def _encode_text(self, s: str, *, is_first: bool) -> list[int]:
        """Ids of a text in which no special token is meant; is_first: no other text or token comes before it."""

    @abstractmethod
    def _join(self, ids: list[int]) -> bytes:
        """The bytes of valid ids, joined."""


class TextStream:
    """Decodes tokens incrementally and returns only complete characters.

    If a token ends inside a character, its bytes are kept until later tokens complete it. The returned texts, joined,
    equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: BaseTokenizer, *, strips_space: bool = True) -> None:
        """At the beginning. strips_space: a first space is removed, if the tokenizer does so."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = strips_space and tokenizer.strips_space
        self._at_begin = True

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete, possibly "". A ValueError leaves the stream unchanged."""
        return self._without_first_space(self._utf8.decode(self._tokenizer.decode_bytes(token_ids)))

    def finish(self) -> str:
        """U+FFFD if a character is incomplete, else "". The stream is then empty and can be used again."""
        text = self._without_first_space(self._utf8.decode(b"", final=True))
        self._at_begin = True
        return text

    def _without_first_space(self, text: str) -> str:
        if self._at_begin and self._strips_space and text:
            self._at_begin = False
            return text.removeprefix(" ")
        return text


def _name_set(names: Collection[str], argument: str) -> frozenset[str]:
    """The names as a set. ValueError for a single str, which would be taken as a set of its letters."""
    if isinstance(names, str):
        raise ValueError(f'{argument} must be "all" or a set of special token names, got the str {names!r}')
    return frozenset(names)


@functools.lru_cache
def pattern_of(names: frozenset[str]) -> re.Pattern[str]:
    """A pattern that matches any of the names, longer names first; without names it never matches."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
