"""Chooses the class for a tokenizer's file: Llama 3's own, any other `tokenizer.json`, SentencePiece, or GGUF."""

import os

from fastllama.gguf_header import is_gguf_file
from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_base import BaseTokenizer
from fastllama.tokenizer_gguf import GgufTokenizer
from fastllama.tokenizer_huggingface import HuggingFaceTokenizer
from fastllama.tokenizer_search import find_tokenizer_file, first_bytes, is_json, is_sentencepiece
from fastllama.tokenizer_sentencepiece import SentencePieceTokenizer


def open_tokenizer(path: str | os.PathLike[str], *, llama31: bool = False) -> BaseTokenizer:
    """The tokenizer in a file, or in a checkpoint's folder (`find_tokenizer_file`).

    A `tokenizer.json` of Llama 3's form is read as Llama 3's own tokenizer, with Llama 3.1's names if `llama31`.

    Raises AssertionError if there is no such file, ValueError if it cannot be used.
    """
    file = find_tokenizer_file(path)
    if is_gguf_file(file):
        return GgufTokenizer(file)
    head = first_bytes(file)
    if is_sentencepiece(head):
        return SentencePieceTokenizer(file)
    if not is_json(head):
        return Tokenizer(file, llama31=llama31)
    try:
        return Tokenizer(file, llama31=llama31)
    except ValueError:  # not of Llama 3's form, or damaged: then the next line says so
        return HuggingFaceTokenizer(file)
