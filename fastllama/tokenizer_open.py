"""Chooses the class for a tokenizer's file: Llama 3's own, any other `tokenizer.json`, SentencePiece, or GGUF."""

import os

from fastllama.gguf_header import GGUF_SUFFIX
from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_base import BaseTokenizer
from fastllama.tokenizer_gguf import GgufTokenizer
from fastllama.tokenizer_huggingface import HuggingFaceTokenizer
from fastllama.tokenizer_search import JSON_NAME, find_tokenizer_file, first_bytes, is_gguf, is_json, is_sentencepiece
from fastllama.tokenizer_sentencepiece import SentencePieceTokenizer


def open_tokenizer(path: str | os.PathLike[str], *, llama31: bool = False) -> BaseTokenizer:
    """The tokenizer in a file, or in a checkpoint's folder.

    A `tokenizer.json` of Llama 3's form is read as Llama 3's own tokenizer, with Llama 3.1's names if `llama31`. Beside
    a SentencePiece model in a folder, the `tokenizer.json` is used, as in transformers.

    Raises AssertionError if there is no such file, ValueError if it cannot be used.
    """
    file = find_tokenizer_file(path)
    head = first_bytes(file)
    if is_gguf(head) or file.suffix == GGUF_SUFFIX:
        return GgufTokenizer(file)
    if is_sentencepiece(head):
        beside = file.with_name(JSON_NAME)
        if os.path.isdir(path) and beside.exists():
            return HuggingFaceTokenizer(beside)
        return SentencePieceTokenizer(file)
    if not is_json(head):
        return Tokenizer(file, llama31=llama31)
    try:
        return Tokenizer(file, llama31=llama31)
    except ValueError:  # not of Llama 3's form, or damaged: then the next line says so
        return HuggingFaceTokenizer(file)
