"""The tokenizer in the metadata of a GGUF file, as a pipeline of the package `tokenizers`.

Two kinds: "gpt2", byte-level BPE with its merges (Llama 3, SmolLM), and "llama", SentencePiece's BPE with a score for
every token (Llama 2). SentencePiece joins the neighbours whose token has the best score. So a merge of each pair of
tokens whose join is a token, in the order of the joins' scores, gives the same ids.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllama.gguf_header import read_header, split_files
from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_base import DEFAULT_TEMPLATE
from fastllama.tokenizer_huggingface import HuggingFaceTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
SPACE = "▁"  # SentencePiece's spelling of a space
NO_TOKENIZER = (None, "none", "no_vocab")
LLAMA3_SPLIT = "llama-bpe"
# Names of pre-tokenizers that split as GPT-2's; "default" is what files say that were written without a name.
GPT2_SPLITS = ("gpt-2", "default")
SMOLLM_SPLIT = "smollm"
SPLITS = (LLAMA3_SPLIT, SMOLLM_SPLIT, *GPT2_SPLITS)
NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
STOP_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")


class GgufTokenizer(HuggingFaceTokenizer):
    """A tokenizer from a GGUF file.

    Attributes beside those of HuggingFaceTokenizer:
        chat_templates: the Jinja templates of the model's chat format by name; {} if the file has none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the metadata of a file, or of the first if it is split.

        Raises AssertionError if it has no tokenizer, ValueError for one that cannot be used.
        """
        source = split_files(Path(path))[0]
        fields = _Fields(source, read_header(source).metadata)
        kind = fields.text("model")
        if kind in NO_TOKENIZER:
            raise AssertionError(f"{source} has no tokenizer; give the path of the model's tokenizer file")
        tokens = fields.tokens()
        ids = {name: token for name, key in NAMED_TOKENS.items() if (token := fields.token_id(key)) is not None}
        if kind not in ("gpt2", "llama"):
            raise fields.error("model", "'gpt2' or 'llama'", "; give the path of the model's tokenizer file instead")
        document = _byte_level(fields) if kind == "gpt2" else _sentencepiece(fields, ids.get("unk_token"))
        begins = fields.flag("add_bos_token", kind == "llama" or fields.text("pre") == LLAMA3_SPLIT)
        self._set_up(source, document, {name: tokens[token] for name, token in ids.items()}, begins)
        self.stop_tokens |= {token for key in STOP_IDS if (token := fields.token_id(key)) is not None}
        self.chat_templates = _chat_templates(fields.metadata)

    def __repr__(self) -> str:
        return f"GgufTokenizer({self._path.name!r}, n_words={self.n_words})"


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name: that of the field itself is the usual one, those of fields below it are named."""
    field = "tokenizer.chat_template"
    named = {key.removeprefix(f"{field}."): value for key, value in metadata.items() if key.startswith(f"{field}.")}
    found = {DEFAULT_TEMPLATE: metadata.get(field), **named}
    return {name: value for name, value in found.items() if isinstance(value, str)}


class _Fields:
    """The fields "tokenizer.ggml.*", each checked when it is read."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path = path
        self.metadata = metadata

    def error(self, key: str, expected: str, advice: str = "") -> ValueError:
        name = f"tokenizer.ggml.{key}"
        got = f"got {self.metadata[name]!r:.80}" if name in self.metadata else "it is missing"
        return ValueError(f"{self.path}: field {name!r}: expected {expected}, {got}{advice}")

    def get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return default if value is None else value

    def token_id(self, key: str) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens()):
            raise self.error(key, f"a token id from 0 to {len(self.tokens()) - 1}")
        return value

    def tokens(self) -> list[str]:
        return self._texts("tokens")

    def vocabulary(self) -> dict[str, int]:
        """The id of every token. ValueError if two tokens have the same text."""
        tokens = self.tokens()
        vocabulary = {token: number for number, token in enumerate(tokens)}
        if len(vocabulary) < len(tokens):
            twice = next(number for number, token in enumerate(tokens) if vocabulary[token] != number)
            raise ValueError(
                f"{self.path}: tokens {twice} and {vocabulary[tokens[twice]]} have the same text "
                f"{tokens[twice]!r:.80}; give the path of another tokenizer file"
            )
        return vocabulary

    def types(self) -> list[int]:
        return self._numbers("token_type", int) if self.get("token_type") is not None else [NORMAL] * len(self.tokens())

    def scores(self) -> list[float]:
        return self._numbers("scores", float)

    def merges(self) -> list[list[str]]:
        pairs = [merge.split(" ") for merge in self._texts("merges")]
        if wrong := [pair for pair in pairs if len(pair) != 2]:
            raise ValueError(
                f"{self.path}: field 'tokenizer.ggml.merges': expected two tokens with a space between them, "
                f"got {' '.join(wrong[0])!r:.80}"
            )
        return pairs

    def _texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            raise self.error(key, "a list of texts")
        return value

    def _numbers(self, key: str, kind: type) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) != len(self.tokens()) or type(value[0]) is not kind:
            raise self.error(key, f"a list of {len(self.tokens())} numbers, one for every token")
        return value


def _byte_level(fields: _Fields) -> dict[str, Any]:
    """The pipeline of a byte-level BPE."""
    split = fields.text("pre") or "default"
    if split not in SPLITS:
        advice = "; give the path of the model's tokenizer.json instead"
        raise fields.error("pre", f"one of {', '.join(SPLITS)}", advice)
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split != LLAMA3_SPLIT}
    steps: list[dict[str, Any]] = [whole]
    if split == LLAMA3_SPLIT:
        pattern = {"Regex": Tokenizer.pat_str}
        steps = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, whole]
    elif split == SMOLLM_SPLIT:
        steps = [{"type": "Digits", "individual_digits": True}, whole]
    return _document(
        fields,
        {"ignore_merges": split == LLAMA3_SPLIT, "merges": fields.merges()},
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    )


def _sentencepiece(fields: _Fields, unknown: int | None) -> dict[str, Any]:
    """The pipeline of SentencePiece's BPE with byte fallback."""
    if fields.get("precompiled_charsmap") or fields.flag("remove_extra_whitespaces", False):
        raise ValueError(
            f"{fields.path}: its tokenizer normalises texts (precompiled_charsmap, remove_extra_whitespaces), as "
            "Llama's does not; give the path of the model's own tokenizer file"
        )
    has_prefix = fields.flag("add_space_prefix", True)
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    spell = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return _document(
        fields,
        {
            "unk_token": None if unknown is None else fields.tokens()[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "merges": _merges_of_scores(fields),
        },
        normalizer={"type": "Sequence", "normalizers": [*prefix, spell]},
        decoder={"type": "Sequence", "decoders": [*steps, *([strip] if has_prefix else [])]},
    )


def _merges_of_scores(fields: _Fields) -> list[tuple[str, str]]:
    """Every pair of tokens whose join is a token, those of the best scores first."""
    scores, types = fields.scores(), fields.types()
    texts = {token for token, kind in zip(fields.tokens(), types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    by_score = sorted(zip(fields.tokens(), scores, strict=True), key=lambda pair: -pair[1])  # equal ones: by id
    return [
        (token[:cut], token[cut:])
        for token, _ in by_score
        if token in texts
        for cut in range(1, len(token))
        if token[:cut] in texts and token[cut:] in texts
    ]


def _document(fields: _Fields, model: dict[str, Any], **steps: Any) -> dict[str, Any]:
    """The content of a tokenizer.json with this model. Control and user-defined tokens are added tokens."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, "special": kind != USER_DEFINED, **plain}
        for number, (token, kind) in enumerate(zip(fields.tokens(), fields.types(), strict=True))
        if kind in (CONTROL, USER_DEFINED) and token
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        **steps,
        "model": {"type": "BPE", "vocab": fields.vocabulary(), **model},
    }
