"""What the engine needs of a model, and what can be known of it without its tensors."""

from dataclasses import dataclass
from typing import Protocol

from fastllama.chat_format import Formatter
from fastllama.decode_graph import Decoder
from fastllama.model import Transformer
from fastllama.tokenizer_base import BaseTokenizer


class Model(Protocol):
    """What the engine needs of a Llama."""

    model: Transformer
    tokenizer: BaseTokenizer
    formatter: Formatter
    decoder: Decoder

    def random_streams(self, seeds: int | None, n_rows: int) -> list[tuple[int, int, int]]:
        """The random streams of a request's answers."""


@dataclass(frozen=True)
class Facts:
    """What requests are checked against. Another process can have it, too."""

    tokenizer: BaseTokenizer
    formatter: Formatter
    vocab_size: int
    max_seq_len: int
    max_batch_size: int
    cache_pages: int

    @classmethod
    def of(cls, llm: Model) -> "Facts":
        """Those of a Llama as it is now."""
        model = llm.model
        sizes = model.params.max_seq_len, model.params.max_batch_size, model.cache.pool.n_pages
        return cls(llm.tokenizer, llm.formatter, model.vocab_size, *sizes)
