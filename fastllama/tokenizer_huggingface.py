"""Any `tokenizer.json`, through the package `tokenizers`.

The file describes the complete pipeline from text to ids: normalizer, pre-tokenizer, model, added tokens. The way back
is a table here, of the bytes of every token, made from the file's decoder.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Pipeline

from fastllama import strict_json
from fastllama.tokenizer_base import NO_TOKEN_ID, BaseTokenizer, pattern_of
from fastllama.tokenizer_files import byte_decoder

CONFIG_NAME = "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"  # of older checkpoints
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceTokenizer(BaseTokenizer):
    """A tokenizer from `tokenizer.json`, with the names in `tokenizer_config.json` beside it.

    Attributes beside those of BaseTokenizer:
        model: the `tokenizers.Tokenizer`.
        named_tokens: the text of the named special tokens, such as bos_token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the file. Raises ValueError, with the file and the reason, for one that cannot be used."""
        self._path = Path(path)
        document = _read_json(self._path)
        try:
            self.model = Pipeline.from_str(json.dumps(document))
            later = Pipeline.from_str(json.dumps(_without_first_prefix(document)))
        except Exception as error:  # the package's own class of errors is Exception
            raise ValueError(f"{self._path} is not a tokenizer that the package tokenizers reads: {error}") from None
        self._later = later  # for text after a special token
        for pipeline in (self.model, self._later):
            pipeline.encode_special_tokens = True  # their names in a text are text
            pipeline.no_truncation()
            pipeline.no_padding()
        vocabulary = self.model.get_vocab(with_added_tokens=True)
        self.n_words = max(vocabulary.values(), default=-1) + 1
        added = self.model.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        decoder = _Decoder(document.get("decoder"), self._path)
        self.strips_space = decoder.strips_space
        own_bytes = {number: token.content.encode() for number, token in added.items()}
        self._bytes = {number: decoder.bytes_of(token) for token, number in vocabulary.items()} | own_bytes
        self._set_named_tokens(vocabulary)

    def _set_named_tokens(self, vocabulary: Mapping[str, int]) -> None:
        config = {
            **_read_if_present(self._path.with_name(NAMES_FILE)),
            **_read_if_present(self._path.with_name(CONFIG_NAME)),
        }
        texts = {name: _text_of(value) for name, value in config.items() if name.endswith("_token")}
        self.named_tokens = {name: text for name, text in texts.items() if text is not None}
        ids = {name: vocabulary.get(text, NO_TOKEN_ID) for name, text in self.named_tokens.items()}
        # What the file's post-processor writes before a text, unless the configuration switches it.
        first = self.model.encode("", add_special_tokens=True).ids[:1]
        self.bos_id = ids.get("bos_token", first[0] if first else NO_TOKEN_ID)
        self.eos_id, self.pad_id = ids.get("eos_token", NO_TOKEN_ID), ids.get("pad_token", NO_TOKEN_ID)
        begins = config.get("add_bos_token")
        self._begins = (first == [self.bos_id] if not isinstance(begins, bool) else begins) and self.bos_id >= 0
        self.stop_tokens = {self.eos_id} - {NO_TOKEN_ID}

    def _begin(self) -> list[int]:
        return [self.bos_id] if self._begins else []

    def _end(self) -> list[int]:
        return [self.eos_id] if self.eos_id >= 0 else []

    def _encode_text(self, s: str, *, is_first: bool) -> list[int]:
        text = s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._ids(text, is_first)
        if (match := pattern_of(frozenset(self.special_tokens)).search(text)) is None:
            return ids
        if self.special_tokens[match[0]] in ids:  # the names are pieces of the model, too: encode this one in two parts
            cut = match.start() + 1
            return self._ids(text[:cut], is_first) + self._encode_text(text[cut:], is_first=False)
        return ids

    def _ids(self, text: str, is_first: bool) -> list[int]:
        pipeline = self.model if is_first else self._later
        return list(pipeline.encode(text, add_special_tokens=False).ids)

    def _join(self, ids: list[int]) -> bytes:
        return b"".join(self._bytes.get(token, b"") for token in ids)

    def __repr__(self) -> str:
        return f"HuggingFaceTokenizer({self._path.name!r}, n_words={self.n_words})"


class _Decoder:
    """The part of a decoder that concerns one token, and whether it removes the first space of a text."""

    def __init__(self, description: Any, path: Path) -> None:
        self.strips_space = False
        self._is_byte_level = self._has_byte_tokens = False
        self._replaced: list[tuple[str, str]] = []
        self._byte_of = byte_decoder()
        steps = [description]
        if isinstance(description, dict) and description.get("type") == "Sequence":
            steps = description.get("decoders") or []
        if not all(isinstance(step, dict) and self._add(step) for step in steps):
            raise ValueError(
                f"{path}: its decoder is {json.dumps(description)[:200]}, which is not supported; expected ByteLevel, "
                "Metaspace, or Replace, ByteFallback, Fuse and Strip"
            )

    def _add(self, step: dict[str, Any]) -> bool:
        """Take one step of the decoder. False for one that is not known."""
        kind = step.get("type")
        if kind == "ByteLevel":
            self._is_byte_level = True
        elif kind == "ByteFallback":
            self._has_byte_tokens = True
        elif kind == "Metaspace":
            self._replaced.append((step.get("replacement", "▁"), " "))
            self.strips_space = step.get("prepend_scheme", "always") != "never"
        elif kind == "Replace" and isinstance(step.get("pattern"), dict) and "String" in step["pattern"]:
            self._replaced.append((step["pattern"]["String"], step.get("content", "")))
        elif kind == "Strip" and (step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0):
            self.strips_space = True
        else:
            return kind == "Fuse"
        return True

    def bytes_of(self, token: str) -> bytes:
        """The bytes of one token of the model."""
        if self._has_byte_tokens and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replaced:
            token = token.replace(old, new)
        if self._is_byte_level and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        return token.encode()


def _without_first_prefix(document: dict[str, Any]) -> dict[str, Any]:
    """The pipeline for text that is not the first of a prompt: a prefix that only the first text has is left out."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "Metaspace" and value.get("prepend_scheme") == "first":
            return value | {"prepend_scheme": "never"}
        if isinstance(value, dict) and value.get("type") == "Sequence":
            return value | {"pretokenizers": [changed(step) for step in value.get("pretokenizers") or []]}
        return value

    return document | {"pre_tokenizer": changed(document.get("pre_tokenizer"))}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = strict_json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except strict_json.ConflictingValues as error:
        raise ValueError(f"{path}: {error}; the file is damaged") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(document).__name__}; the file is damaged")
    return document


def _read_if_present(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.exists() else {}


def _text_of(token: Any) -> str | None:
    """The text of a named token: a str, or an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
