"""Log-probabilities in the formats of OpenAI's two APIs."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastllama.engine.sequence import TopLogprobs
from fastllama.tokenizer_base import BaseTokenizer, TextStream

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks, as in OpenAI's API
BYTES_PREFIX = "bytes:"  # of a token in a completion that is no complete text


class TextOffsets:
    """Where the text of each token of an answer begins. The tokens may come in pieces."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._stream, self._length = TextStream(tokenizer), 0

    def push(self, tokens: Iterable[int]) -> list[int]:
        """The offsets of the next tokens, in characters."""
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._length)
            self._length += len(self._stream.push([token]))
        return offsets


def completion_logprobs(
    tokenizer: BaseTokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[TopLogprobs] | None,
    offsets: TextOffsets | None = None,
) -> dict[str, Any]:
    """The object of /v1/completions. A log-probability is None for a first token, which nothing came before.

    tops: the most likely tokens at each place; the object has the token itself beside them. offsets: of an answer that
    comes in pieces.
    """
    texts = [_token_text(tokenizer, token, BYTES_PREFIX) for token in tokens]
    top_logprobs: list[dict[str, float] | None] = []
    for text, logprob, top in zip(texts, logprobs, tops or [[]] * len(tokens), strict=True):
        if logprob is None:
            top_logprobs.append(None)
            continue
        found = {text: _finite(logprob)}
        for other, other_logprob in top:
            found.setdefault(_token_text(tokenizer, other, BYTES_PREFIX), _finite(other_logprob))
        top_logprobs.append(dict(sorted(found.items(), key=lambda item: -item[1])))
    return {
        "tokens": texts,
        "token_logprobs": [None if logprob is None else _finite(logprob) for logprob in logprobs],
        "top_logprobs": top_logprobs,
        "text_offset": (offsets or TextOffsets(tokenizer)).push(tokens),
    }


def chat_logprobs(
    tokenizer: BaseTokenizer, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs] | None
) -> dict[str, Any]:
    """The object of /v1/chat/completions."""
    content: list[dict[str, Any]] = []
    for token, logprob, top in zip(tokens, logprobs, tops or [[]] * len(tokens), strict=True):
        entry = _entry(tokenizer, token, logprob)
        entry["top_logprobs"] = [_entry(tokenizer, *one) for one in top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(tokenizer: BaseTokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.decode_bytes([token])
    return {"token": _token_text(tokenizer, token), "logprob": _finite(logprob), "bytes": list(data)}


def _token_text(tokenizer: BaseTokenizer, token: int, prefix: str = "") -> str:
    r"""A token's text; where it is a part of a character, its bytes as \xe2\x80."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
