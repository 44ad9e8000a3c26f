"""Finds the tokenizer's file in a checkpoint's folder, and tells from its first bytes what kind of file it is."""

import logging
import os
from pathlib import Path

from fastllama.gguf_header import gguf_models

logger = logging.getLogger(__name__)

JSON_NAME = "tokenizer.json"
HEAD_BYTES = 512  # which tell the kind of a file
# Places of a tokenizer inside a checkpoint folder, in the order of the search. The folder's own files go before those
# of the base model, which a Hugging Face repository keeps under original/.
FILES_IN_FOLDER = (
    "tokenizer.model",
    JSON_NAME,
    "original/tokenizer.model",
    "original/mp8/tokenizer.model",
    "original/mp16/tokenizer.model",
)


def find_tokenizer_file(model_path: str | os.PathLike[str]) -> Path:
    """The file itself, or the first of `FILES_IN_FOLDER` in a folder, else the GGUF model there, if it is the only one.

    A tokenizer.json goes before a SentencePiece model, as in transformers. The log says which files are passed over.
    Raises AssertionError if there is none.
    """
    path = Path(model_path)
    if os.path.isfile(path):  # unlike Path.is_file, false for any string
        return path
    if not os.path.isdir(path):
        raise AssertionError(
            f"tokenizer file {path} does not exist; give the path of the tokenizer.model or tokenizer.json"
        )
    present = [name for name in FILES_IN_FOLDER if os.path.isfile(path / name)]
    if not present and len(models := gguf_models(path)) == 1:
        present = [models[0].name]
    if not present:
        raise AssertionError(
            f"no tokenizer in the folder {path}: expected one of {', '.join(FILES_IN_FOLDER)}, or one GGUF file; give "
            "its path as tokenizer_path, or save a tokenizer.json with transformers' AutoTokenizer"
        )
    if JSON_NAME in present[1:] and is_sentencepiece(first_bytes(path / present[0])):
        present.remove(JSON_NAME)
        present.insert(0, JSON_NAME)
    logger.info("tokenizer: %s%s", path / present[0], f"; passed over: {', '.join(present[1:])}" * bool(present[1:]))
    return path / present[0]


def first_bytes(path: Path) -> bytes:
    """The bytes that `is_json` and `is_sentencepiece` need."""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def is_json(data: bytes) -> bool:
    """Whether a file that begins with these bytes is a `tokenizer.json`."""
    return data[:64].lstrip().startswith(b"{")


def is_sentencepiece(data: bytes) -> bool:
    """Whether a file that begins with these bytes is a SentencePiece model."""
    # A protobuf, whose first pieces are the unknown token and control tokens.
    return data.startswith(b"\n") and any(piece in data[:128] for piece in (b"<unk>", b"<s>", b"<pad>"))


def refuse_other_files(data: bytes, path: Path) -> None:
    """Raise ValueError, with advice, for files that are often found in a tokenizer's place."""
    head = data[:HEAD_BYTES].lstrip().lower()
    if not data.strip():
        raise ValueError(f"{path} is empty; expected a Llama 3 tokenizer.model or tokenizer.json")
    if is_sentencepiece(data):
        raise ValueError(f"{path} is a SentencePiece model, as Llama 1 and 2 have, not a Llama 3 tokenizer")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself; fetch that with `git lfs pull`")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not a tokenizer; download it again, logged in if the site asks for it")
