"""SentencePiece's `tokenizer.model`, as Llama 2 and TinyLlama have, through the package `sentencepiece`."""

import os
from pathlib import Path

from fastllama.tokenizer_base import BaseTokenizer

ADDED_TOKENS = "added_tokens.json"
SPACE = "▁"  # SentencePiece's spelling of a space


class SentencePieceTokenizer(BaseTokenizer):
    """A tokenizer from a SentencePiece model. Its control tokens, such as `<s>`, decode to nothing.

    Attributes beside those of BaseTokenizer:
        model: the `sentencepiece.SentencePieceProcessor`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the file. ValueError if it is damaged, or if the package is not installed."""
        self._path = Path(path)
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ValueError(
                f"{path} is a SentencePiece model: reading it needs a package, pip install fastllama[sentencepiece]"
            ) from None
        try:
            self.model = model = SentencePieceProcessor(model_proto=self._path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a SentencePiece model, or is damaged: {error}") from None
        self.n_words = model.vocab_size()
        if (beside := self._path.with_name(ADDED_TOKENS)).exists():
            raise ValueError(
                f"{path} has tokens added to it in {beside.name}, which is not supported: save a tokenizer.json with "
                "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        self.bos_id, self.eos_id, self.pad_id = model.bos_id(), model.eos_id(), model.pad_id()
        self.stop_tokens = {self.eos_id} if self.eos_id >= 0 else set()
        pieces = {token: model.id_to_piece(token) for token in range(self.n_words)}
        self.special_tokens = {piece: token for token, piece in pieces.items() if model.is_control(token)}
        self.strips_space = model.decode(model.encode("a")) == "a" and pieces[model.encode("a")[0]].startswith(SPACE)
        self._bytes = {token: self._bytes_of(token, piece) for token, piece in pieces.items()}

    def _bytes_of(self, token: int, piece: str) -> bytes:
        if self.model.is_control(token):
            return b""
        if self.model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return (self.model.decode([token]) if self.model.is_unknown(token) else piece.replace(SPACE, " ")).encode()

    def _begin(self) -> list[int]:
        return [self.bos_id] if self.bos_id >= 0 else []

    def _end(self) -> list[int]:
        return [self.eos_id] if self.eos_id >= 0 else []

    def _encode_text(self, s: str, *, is_first: bool) -> list[int]:
        well_formed = s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return list(self.model.encode(well_formed))

    def _join(self, ids: list[int]) -> bytes:
        return b"".join(self._bytes[token] for token in ids)

    def __repr__(self) -> str:
        return f"SentencePieceTokenizer({self._path.name!r}, n_words={self.n_words})"
