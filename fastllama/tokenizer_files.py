"""Reads and checks tokenizer files: the ranks of byte strings, and the names of the special tokens that follow them.

Meta's `tokenizer.model` has one line per token: base64 and rank. Hugging Face's `tokenizer.json` describes a complete
pipeline (normalizer, pre-tokenizer, model). Llama 3 uses one form of it: no normalizer, Llama's split pattern, and a
byte-level BPE, in which a token's id is its rank and each of its bytes is one printable character. Other forms raise an
error, because fastllama would encode text differently.

The merges of a `tokenizer.json` must agree with the ranks. tiktoken merges the pair that makes the lowest rank. That
gives the same tokens as the list of merges only if the merges are in the order of the ids they make and make every
token longer than a byte.
"""

import binascii
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllama import strict_json
from fastllama.tokenizer_search import find_tokenizer_file, is_json, refuse_other_files

NUM_SPECIAL_TOKENS = 256
# Names of special tokens that are not numbered as reserved, by offset: the id minus the number of ranks.
LLAMA30_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
LLAMA31_NAMES = LLAMA30_NAMES | {
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    8: "<|eom_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}
# A tokenizer.json must have the required names at these offsets, and may have the fixed names at no other offset. 3.1's
# other names differ between releases.
REQUIRED_NAMES = LLAMA30_NAMES
FIXED_NAMES = LLAMA30_NAMES | {8: "<|eom_id|>"}


@dataclass(frozen=True)
class TokenizerFile:
    """The content of a tokenizer file."""

    name: str
    ranks: dict[bytes, int]
    """Rank, which is also the id, by token: 0 to n - 1, each once. Every single byte is a token."""
    special_names: dict[int, str]
    """Names of special tokens by offset, as a `tokenizer.json` gives them; {} for a ranks file."""


def read_tokenizer_file(model_path: str | os.PathLike[str], pat_str: str) -> TokenizerFile:
    """The content of a ranks file, of a `tokenizer.json`, or of the first of `FILES_IN_FOLDER` in a folder.

    A `tokenizer.json` must split text by `pat_str`. Raises AssertionError if there is no such file. Raises ValueError,
    with the file and the reason, if it is not a Llama 3 tokenizer.
    """
    path = find_tokenizer_file(model_path)
    data = path.read_bytes()
    refuse_other_files(data, path)
    added: dict[int, str] = {}
    if is_json(data):
        ranks, added = _read_tokenizer_json(data, path, pat_str)
    else:
        ranks = _read_ranks(data, path)
    _check_ranks(ranks, path)
    return TokenizerFile(path.name, ranks, _special_names_by_offset(added, len(ranks), path))


def _read_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Ranks by token, from the lines of a ranks file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, digits = line.split()
            token = binascii.a2b_base64(encoded, strict_mode=True)
            # int() alone would also accept "+1" and "1_0".
            rank = int(digits) if digits.isdigit() else None
        except ValueError:
            rank = None
        if rank is None:
            raise ValueError(
                f"{path}, line {number}: expected a token in base64 and its rank, got {line[:60]!r}; "
                "the file is damaged or is not a Llama 3 tokenizer.model"
            )
        if token in ranks:
            raise ValueError(f"{path}, line {number}: token {token!r} has rank {ranks[token]} already")
        ranks[token] = rank
    return ranks


def _check_ranks(ranks: Mapping[bytes, int], path: Path) -> None:
    """Raise ValueError unless ranks are 0 to n - 1, each once, and every single byte is a token."""
    missing_ranks = set(range(len(ranks))).difference(ranks.values())
    if missing_ranks:
        raise ValueError(
            f"{path}: {len(ranks)} tokens need the ranks 0 to {len(ranks) - 1}, each once, but none has rank "
            f"{min(missing_ranks)}; the file is damaged or is not a Llama 3 tokenizer"
        )
    missing_bytes = [value for value in range(256) if bytes([value]) not in ranks]
    if missing_bytes:
        raise ValueError(
            f"{path}: {len(missing_bytes)} of the 256 single bytes are not tokens, the first of them "
            f"{bytes(missing_bytes[:1])!r}, so some text has no encoding; this is not a complete Llama 3 tokenizer"
        )


def _special_names_by_offset(added: Mapping[int, str], n_ranks: int, path: Path) -> dict[int, str]:
    """Names by offset, from names by id. ValueError unless the special tokens have Llama 3's ids."""
    if not added:
        return {}
    names = {token_id - n_ranks: name for token_id, name in added.items()}
    for offset, name in names.items():
        if not 0 <= offset < NUM_SPECIAL_TOKENS:
            raise ValueError(
                f"{path}: added token {name!r} has id {n_ranks + offset}, but Llama 3's special tokens are ids "
                f"{n_ranks} to {n_ranks + NUM_SPECIAL_TOKENS - 1}; a vocabulary extended beyond them cannot be used"
            )
    for offset, name in FIXED_NAMES.items():
        actual = names.get(offset)
        if actual != name and (offset in REQUIRED_NAMES or name in names.values()):
            raise ValueError(
                f"{path}: expected the special token {name!r} at id {n_ranks + offset}, found {actual!r}; "
                "the special tokens do not have Llama 3's ids"
            )
    return names


class _NotLlama3Error(Exception):
    """A difference between a tokenizer.json and Llama 3's. It becomes a ValueError with the file's name."""


def _read_tokenizer_json(data: bytes, path: Path, pat_str: str) -> tuple[dict[bytes, int], dict[int, str]]:
    """Ranks by token, and names of the added tokens by id."""
    try:
        document = strict_json.loads(data)
    except strict_json.ConflictingValues as error:
        raise ValueError(f"{path}: {error}; the file is damaged") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged") from None
    try:
        added = _added_tokens(document["added_tokens"])
        _check_pipeline(document, pat_str)
        # Some programs also list the special tokens in the vocabulary.
        vocab = {token: rank for token, rank in document["model"]["vocab"].items() if added.get(rank) != token}
        ranks = _ranks_from_vocab(vocab)
        _check_merges(document["model"]["merges"], vocab)
    except _NotLlama3Error as difference:
        raise ValueError(
            f"{path} is not a Llama 3 tokenizer: {difference}. Give the checkpoint's tokenizer.model if it has one"
        ) from None
    except (KeyError, TypeError, AttributeError) as error:
        # Any part may be missing or of another type. One message for all replaces a check at each step.
        raise ValueError(f"{path} is not a complete tokenizer.json ({type(error).__name__}: {error})") from None
    return ranks, added


def _added_tokens(entries: list[dict[str, Any]]) -> dict[int, str]:
    """Names of the added tokens by id."""
    added: dict[int, str] = {}
    for entry in entries:
        token_id, name = entry["id"], entry["content"]
        if type(token_id) is not int or not isinstance(name, str) or not name:
            raise _NotLlama3Error(f"an added token must have an int as id and a text as content, got {entry!r:.80}")
        if token_id in added or name in added.values():
            raise _NotLlama3Error(f"added token {name!r}, id {token_id}, is listed twice")
        added[token_id] = name
    if not added:
        raise _NotLlama3Error("it has no special tokens (added_tokens is empty)")
    return added


def _check_pipeline(document: Mapping[str, Any], pat_str: str) -> None:
    """Raise _NotLlama3Error unless normalizer, pre-tokenizer and model options are Llama 3's."""
    model = document["model"]
    if model["type"] != "BPE":
        raise _NotLlama3Error(f"its model is {model['type']!r}, expected 'BPE'")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise _NotLlama3Error(f"its BPE has {option}={model[option]!r}, expected none")
    if document["normalizer"] is not None:
        raise _NotLlama3Error(f"it normalizes text ({document['normalizer']!r:.80}), expected no normalizer")

    pre_tokenizer = document["pre_tokenizer"] or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        raise _NotLlama3Error(f"its pre-tokenizer is {pre_tokenizer!r:.100}, expected Split and then ByteLevel")
    split, byte_level = steps
    if split["pattern"] != {"Regex": pat_str} or split["behavior"] != "Isolated" or split["invert"]:
        raise _NotLlama3Error(f"it splits text by {split['pattern']!r:.200}, expected Llama 3's pattern, isolated")
    if byte_level["add_prefix_space"] or byte_level["use_regex"]:
        raise _NotLlama3Error("its ByteLevel step adds a space or splits text again, expected neither")


def _ranks_from_vocab(vocab: Mapping[str, int]) -> dict[bytes, int]:
    """Ranks by bytes, from ids by printable spelling."""
    byte_of = byte_decoder()
    ranks: dict[bytes, int] = {}
    for token, rank in vocab.items():
        if type(rank) is not int:
            raise _NotLlama3Error(f"token {token!r} has id {rank!r}, expected an int")
        try:
            ranks[bytes([byte_of[character] for character in token])] = rank
        except KeyError:
            raise _NotLlama3Error(f"token {token!r}, id {rank}, is not written as bytes") from None
    return ranks


def byte_decoder() -> dict[str, int]:
    """The byte of each character in GPT-2's spelling.

    A printable Latin-1 character is its own byte. The characters from U+0100 are the other bytes in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    code_points = itertools.count(0x100)
    return {chr(byte if byte in printable else next(code_points)): byte for byte in range(256)}


def _check_merges(merges: list[str | list[str]], vocab: Mapping[str, int]) -> None:
    """Raise _NotLlama3Error unless the merges are in the order of the ids they make and make every longer token."""
    last = -1
    made: set[int] = set()
    for merge in merges:
        # Older versions write "left right", newer ones ["left", "right"].
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise _NotLlama3Error(f"merge {merge!r} does not join two tokens into a third")
        product = vocab["".join(pair)]
        if product < last:
            raise _NotLlama3Error(f"merge {merge!r} makes token {product}, but an earlier one makes token {last}")
        last = product
        made.add(product)
    unmade = [token for token, rank in vocab.items() if len(token) > 1 and rank not in made]
    if unmade:
        raise _NotLlama3Error(f"{len(unmade)} of its tokens, such as {unmade[0]!r}, come from no merge")
