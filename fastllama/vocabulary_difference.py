"""Whether two tokenizers have the same vocabulary, token by token."""

from fastllama.tokenizer_base import BaseTokenizer

NO_TOKEN = "no token"


def first_difference(one: BaseTokenizer, other: BaseTokenizer) -> str | None:
    """The first token that differs, in words; None if every id has the same bytes in both."""
    for token in range(max(one.n_words, other.n_words)):
        first, second = _bytes(one, token), _bytes(other, token)
        if first != second:
            return f"token {token} is {_shown(first)} for the model and {_shown(second)} for the draft model"
    return None


def _bytes(tokenizer: BaseTokenizer, token: int) -> bytes | None:
    return tokenizer.decode_bytes([token]) if token < tokenizer.n_words else None


def _shown(token: bytes | None) -> str:
    return NO_TOKEN if token is None else repr(token.decode(errors="backslashreplace"))
