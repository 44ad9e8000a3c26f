"""Learns a byte-level BPE vocabulary and writes it as a ranks file, the format of Llama 3's `tokenizer.model`.

Llama 3's split pattern cuts the text into words. The first 256 ranks are the single bytes. Each further rank merges the
pair of adjacent tokens that is most frequent at that moment. The ranks are in merge order, and tiktoken needs only them
to encode.
"""

import base64
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from fastllama.tokenizer import Tokenizer

BYTES = 256


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word of the split pattern occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(regex.findall(Tokenizer.pat_str, text))
    return counts


def learn_ranks(word_counts: dict[str, int], size: int) -> dict[bytes, int]:
    """`size` ranks, learned by merging pairs in the counted words. Ties go to the pair with the lowest ranks."""
    tokens = [bytes([value]) for value in range(BYTES)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    words = [(list(word.encode()), count) for word, count in sorted(word_counts.items()) if count > 0]
    pair_counts: Counter[tuple[int, int]] = Counter()
    words_with: dict[tuple[int, int], set[int]] = {}
    for index, (word, count) in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += count
            words_with.setdefault(pair, set()).add(index)
    while len(tokens) < size:
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair), default=None)
        if best is None or pair_counts[best] <= 0:
            raise ValueError(f"expected text for {size} ranks, got text for only {len(tokens)}: add more text")
        merged = tokens[best[0]] + tokens[best[1]]
        # Two different pairs with the same bytes are the same token.
        rank = ranks.setdefault(merged, len(tokens))
        if rank == len(tokens):
            tokens.append(merged)
        for index in sorted(words_with.pop(best)):
            word, count = words[index]
            for pair in pairwise(word):
                pair_counts[pair] -= count
            word[:] = _merge(word, best, rank)
            for pair in pairwise(word):
                pair_counts[pair] += count
                words_with.setdefault(pair, set()).add(index)
        del pair_counts[best]
    return ranks


def _merge(word: list[int], pair: tuple[int, int], rank: int) -> list[int]:
    """The word with each occurrence of the pair replaced by `rank`, from left to right."""
    merged: list[int] = []
    position = 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            merged.append(rank)
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


def write_ranks(ranks: dict[bytes, int], path: Path) -> None:
    """Write one line per token: its bytes in base64, a space, its rank."""
    by_rank = sorted(ranks, key=ranks.__getitem__)
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(by_rank)))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the file of `write_ranks` -> ranks by token."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoder over the ranks, without special tokens: the corpus inserts their ids."""
    return tiktoken.Encoding("fastllama-builtin", pat_str=Tokenizer.pat_str, mergeable_ranks=ranks, special_tokens={})
