"""Any `tokenizer.json`, through the package `tokenizers`.

The file describes the complete pipeline from text to ids: normalizer, pre-tokenizer, model, added tokens. The way back
is a table here, of the bytes of every token, made from the file's decoder.
"""

import itertools
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Pipeline

from fastllama import strict_json
from fastllama.tokenizer_base import NO_TOKEN_ID, BaseTokenizer
from fastllama.tokenizer_files import byte_decoder

logger = logging.getLogger(__name__)

CONFIG_NAME = "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"  # of older checkpoints
ENDS = ("bos_token", "eos_token", "pad_token")
PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}  # an added token's options
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceTokenizer(BaseTokenizer):
    """A tokenizer from `tokenizer.json`, with the names in `tokenizer_config.json` beside it.

    Attributes beside those of BaseTokenizer:
        model: the `tokenizers.Tokenizer`.
        named_tokens: the text of the named special tokens, such as bos_token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the file. Raises ValueError, with the file and the reason, for one that cannot be used."""
        path = Path(path)
        names = _read_if_present(path.with_name(NAMES_FILE))
        stated = _read_if_present(path.with_name(CONFIG_NAME))
        names |= {name: value for name, value in stated.items() if value is not None}
        self._set_up(path, strict_json.read_object(path), names)

    def _set_up(
        self, path: Path, document: dict[str, Any], names: Mapping[str, Any], begins: bool | None = None
    ) -> None:
        """Make the pipeline of a `tokenizer.json`'s content, with the content of tokenizer_config.json.

        path: the file that both come from, for messages. begins: whether a text begins with bos_token; None leaves
        that to the pipeline's post-processor.
        """
        self._path = path
        self.model = _pipeline(path, document)
        texts = {name: _text_of(value) for name, value in names.items() if name.endswith("_token")}
        self.named_tokens = {name: text for name, text in texts.items() if text is not None}
        # A large vocabulary takes time to read: pipelines are made again only where they differ.
        whole = _with_special_tokens(path, document, self.model, names, self.named_tokens)
        self.model = self.model if whole == document else _pipeline(path, whole)
        later = _without_first_prefix(whole)
        self._later = self.model if later == whole else _pipeline(path, later)  # for text after a special token
        vocabulary = self.model.get_vocab(with_added_tokens=True)
        self.n_words = max(vocabulary.values(), default=-1) + 1
        added = self.model.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        self._strips = {token.content: (token.lstrip, token.rstrip) for token in added.values() if token.special}
        # A model may write its unknown token for any text; the others only come from their names.
        self._control = set(self.special_tokens.values()) - {_unknown_id(document["model"], vocabulary)}
        decoder = _Decoder(document.get("decoder"), path)
        self.strips_space = decoder.strips_space
        self._bytes = {number: decoder.bytes_of(token) for token, number in vocabulary.items()}
        self._set_ends(vocabulary, begins)

    def _set_ends(self, vocabulary: Mapping[str, int], begins: bool | None) -> None:
        ids = {name: vocabulary[text] for name, text in self.named_tokens.items() if text in vocabulary}
        for name in ENDS:
            if name in self.named_tokens and name not in ids:
                logger.warning("%s: no token is %s=%r", self._path, name, self.named_tokens[name])
        plain = self.model.encode("a", add_special_tokens=False).ids
        whole = self.model.encode("a", add_special_tokens=True).ids
        starts = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
        first = whole[: starts[0]] if starts else []
        self.bos_id = ids.get("bos_token", first[0] if first else NO_TOKEN_ID)
        self.eos_id, self.pad_id = ids.get("eos_token", NO_TOKEN_ID), ids.get("pad_token", NO_TOKEN_ID)
        if begins is not None:
            first = [self.bos_id] if begins and self.bos_id != NO_TOKEN_ID else []
        self._first = first
        self.stop_tokens = {self.eos_id} - {NO_TOKEN_ID}

    def _begin(self) -> list[int]:
        return list(self._first)

    def _end(self) -> list[int]:
        return [self.eos_id] if self.eos_id >= 0 else []

    def _strips_around(self, name: str) -> tuple[bool, bool]:
        return self._strips[name]

    def _encode_text(self, s: str, *, is_first: bool) -> list[int]:
        parts = [s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")]
        ids: list[int] = []
        while parts:
            part = parts.pop()
            encoding = (self._later if ids or not is_first else self.model).encode(part, add_special_tokens=False)
            # The names of special tokens may be pieces of the model, too: they are cut after their first character.
            cuts = [
                start + 1
                for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
                if token in self._control
            ]
            if not cuts:
                ids += encoding.ids
                continue
            places = [0, *(cut for cut in dict.fromkeys(cuts) if cut < len(part)), len(part)]
            if len(places) == 2:
                raise ValueError(f"{self._path}: no encoding of {part!r:.80} is without special tokens")
            parts += [part[begin:end] for begin, end in reversed(list(itertools.pairwise(places)))]
        return ids

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
                "Metaspace, or Replace, ByteFallback, Fuse and Strip; give the model's tokenizer.model if it has one"
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


def _pipeline(path: Path, document: dict[str, Any]) -> Pipeline:
    """The pipeline of a `tokenizer.json`, for which the names of special tokens in a text are text."""
    try:
        pipeline = Pipeline.from_str(json.dumps(document))
    except Exception as error:  # the package's own class of errors is Exception
        raise ValueError(f"{path} is not a tokenizer that the package tokenizers reads: {error}") from None
    pipeline.encode_special_tokens = True
    pipeline.no_truncation()
    pipeline.no_padding()
    return pipeline


def _unknown_id(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """The id that a model writes for what it does not know: Unigram states the id, others the token."""
    number = model.get("unk_id")
    return number if isinstance(number, int) else vocabulary.get(model.get("unk_token") or "")


def _with_special_tokens(
    path: Path, document: dict[str, Any], model: Pipeline, names: Mapping[str, Any], named: Mapping[str, str]
) -> dict[str, Any]:
    """The document with every token special that transformers takes as such: also the configuration's.

    Raises ValueError for tokens of the configuration that the pipeline does not have: the two files do not fit.
    """
    more = {_text_of(token) for token in names.get("additional_special_tokens") or []} | set(named.values())
    listed = names.get("added_tokens_decoder") or {}
    for number, token in listed.items() if isinstance(listed, dict) else ():
        content = _text_of(token)
        if content is not None and model.token_to_id(content) is None:
            raise ValueError(f"{path}: {CONFIG_NAME} has the token {content!r}, id {number}, which is not in it")
        if isinstance(token, dict) and token.get("special") is True:
            more.add(content)
    added = {entry["content"]: entry for entry in document.get("added_tokens") or []}
    for content in filter(None, more):
        number = model.token_to_id(content)
        if number is not None:
            added[content] = PLAIN_TOKEN | added.get(content, {}) | {"id": number, "content": content, "special": True}
    return document | {"added_tokens": sorted(added.values(), key=lambda entry: int(entry["id"]))}


def _without_first_prefix(document: dict[str, Any]) -> dict[str, Any]:
    """The pipeline for text that is not the first of a prompt: a prefix that only the first text has is left out."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "Metaspace" and value.get("prepend_scheme") == "first":
            return value | {"prepend_scheme": "never"}
        if isinstance(value, dict) and value.get("type") == "Sequence":
            return value | {"pretokenizers": [changed(step) for step in value.get("pretokenizers") or []]}
        return value

    return document | {"pre_tokenizer": changed(document.get("pre_tokenizer"))}


def _read_if_present(path: Path) -> dict[str, Any]:
    return strict_json.read_object(path) if path.exists() else {}


def _text_of(token: Any) -> str | None:
    """The text of a named token: a str, or an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
