"""Tokenizers of kinds that fastllama does not have."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from fastllama import Tokenizer
from tests.support.bad_checkpoints import huggingface
from tests.support.pipelines import byte_level, write_pipeline, write_sentencepiece
from tests.support.refusals.case import MODEL, Refusal, build, without_package

WORD_PIECES = {"type": "WordPiece", "prefix": "##", "cleanup": True}


def _sentencepiece(*beside: str) -> None:
    write_sentencepiece(huggingface(MODEL))
    for name in beside:
        (MODEL / name).write_text('{"<|im_start|>": 400}')


def _slow() -> None:
    huggingface(MODEL)
    (MODEL / "vocab.json").write_text("{}")
    (MODEL / "merges.txt").write_text("")


def _with_decoder(decoder: dict[str, Any]) -> None:
    path = write_pipeline(byte_level(), huggingface(MODEL))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": decoder}))


def _as_llama3(name: str) -> partial[Tokenizer]:
    return partial(Tokenizer, Path(MODEL / name))


CASES = [
    Refusal("no tokenizer, or `vocab.json` and `merges.txt` alone", _slow, error=AssertionError),
    Refusal("SentencePiece without its package", _sentencepiece, without_package("sentencepiece", build)),
    Refusal("SentencePiece with `added_tokens.json`", partial(_sentencepiece, "added_tokens.json")),
    Refusal("a `tokenizer.json` with another decoder", partial(_with_decoder, WORD_PIECES)),
    Refusal(
        "another `tokenizer.json`, given to the class `Tokenizer`",
        lambda: write_pipeline(byte_level(), MODEL),
        _as_llama3("tokenizer.json"),
    ),
    Refusal("SentencePiece, given to the class `Tokenizer`", _sentencepiece, _as_llama3("tokenizer.model")),
]
