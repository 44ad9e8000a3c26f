"""The built-in model's training text: an endless, reproducible stream of stories, conversations and plain texts.

A document is a list of spans. Each is a string or a special token (by its offset from the end of the ranks), with its
tokens' weight in the loss: 1 for text that the model learns to write, READ_WEIGHT or 0 for text that it only reads.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import tiktoken

from fastllama.builtin.bpe import count_words
from fastllama.builtin.conversation_data import common_words
from fastllama.builtin.conversations import Turn, dialog
from fastllama.builtin.data_files import columns, lines, sections
from fastllama.builtin.facts import draw_relation, facts_by_relation
from fastllama.builtin.stories import story

# Offsets of Llama 3's special tokens from the end of the ranks.
BEGIN_OF_TEXT, END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN = 0, 1, 6, 7, 9

STORY_SHARE, DIALOG_SHARE = 0.16, 0.78
READ_WEIGHT = 0.1
MAX_TOKENS_PER_DOCUMENT = 512
ZIPF_OFFSET = 20
WORD_SCALE = 60_000
PROSE_SCALE = 30
SAMPLE_SCALE = 0.35


@dataclass(frozen=True)
class Span:
    """A text, or the offset of a special token, and its weight in the loss."""

    text: str | int
    weight: float = 1.0


def documents(seed: int) -> Iterator[list[Span]]:
    """An endless stream of documents. The same seed gives the same documents."""
    rng = random.Random(seed)
    while True:
        drawn = rng.random()
        if drawn < STORY_SHARE:
            yield text_document(_maybe_split(story(rng), rng))
        elif drawn < STORY_SHARE + DIALOG_SHARE:
            yield dialog_document(dialog(rng))
        else:
            yield text_document(plain_text(rng))


def text_document(parts: list[str]) -> list[Span]:
    """begin_of_text, the parts, end_of_text. Parts are encoded separately, as a prompt and its continuation are."""
    return [Span(BEGIN_OF_TEXT, 0.0), *map(Span, parts), Span(END_OF_TEXT)]


def dialog_document(turns: list[Turn]) -> list[Span]:
    """A conversation in Llama 3's chat format."""
    spans = [Span(BEGIN_OF_TEXT, 0.0)]
    for turn in turns:
        answers = turn.role == "assistant"
        spans += [Span(START_HEADER, 0.0), Span(turn.role, 0.0), Span(END_HEADER, 0.0), Span("\n\n", 0.0)]
        weight = float(turn.learned) if answers else READ_WEIGHT
        spans += [Span(turn.content, weight), Span(END_OF_TURN, weight if answers else 0.0)]
    return spans


def encode(document: list[Span], encoder: tiktoken.Encoding) -> tuple[list[int], list[float]]:
    """Token ids of a document and the weight of each in the loss, cut after MAX_TOKENS_PER_DOCUMENT."""
    tokens: list[int] = []
    weights: list[float] = []
    for span in document:
        ids = [encoder.n_vocab + span.text] if isinstance(span.text, int) else encoder.encode_ordinary(span.text)
        tokens += ids
        weights += [span.weight] * len(ids)
    return tokens[:MAX_TOKENS_PER_DOCUMENT], weights[:MAX_TOKENS_PER_DOCUMENT]


def plain_text(rng: random.Random) -> list[str]:
    """The parts of a text: a beginning with its continuation, facts, translations, numbers, or prose."""
    kind = rng.random()
    if kind < 0.45:
        beginning, continuations = rng.choice(continued_texts())
        ending = rng.choice(continuations)
        return [beginning, ending] if beginning[-1] == " " else [beginning + ending]
    if kind < 0.8:
        return [_statements(rng)]
    if kind < 0.86:
        return [_translations(rng)]
    if kind < 0.93:
        return [_counting(rng)]
    sentences = rng.choice(prose()).split(". ")
    start = rng.randrange(len(sentences)) if rng.random() < 0.5 else 0
    return _maybe_split(". ".join(sentences[start:]), rng)


@cache
def continued_texts() -> list[tuple[str, list[str]]]:
    """`data/plain.txt`: (beginning, continuations)."""
    texts: list[tuple[str, list[str]]] = []
    for line in lines("plain.txt"):
        if line.startswith("> "):
            texts.append((line[2:], []))
        else:
            texts[-1][1].append(line[2:])
    return texts


@cache
def prose() -> tuple[str, ...]:
    """The paragraphs of `data/prose.txt`."""
    return tuple(lines("prose.txt"))


@cache
def _dictionaries() -> dict[str, list[list[str]]]:
    return {
        heading[1].capitalize(): [columns(line) for line in body]
        for heading, body in sections("facts.txt")
        if heading[0] == "table" and heading[1] in ("french", "spanish", "german")
    }


def _statements(rng: random.Random) -> str:
    """One to six facts, often of one relation."""
    relations = [name for name, (_, facts) in facts_by_relation().items() if facts[0].statements]
    preferred = draw_relation(rng)
    texts: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4, 6))):
        name = preferred if preferred in relations and rng.random() < 0.7 else rng.choice(relations)
        texts.append(rng.choice(rng.choice(facts_by_relation()[name][1]).statements))
    return rng.choice((" ", " ", "\n")).join(texts)


def _translations(rng: random.Random) -> str:
    """A few-shot list to continue: "Translate English to French: dog => chien ..."."""
    language = rng.choice(list(_dictionaries()))
    pairs = rng.sample(_dictionaries()[language], rng.randint(3, 6))
    indent, arrow = rng.choice(("\n\n        ", "\n", "\n        ")), rng.choice((" => ", " => ", " -> ", ": ", " = "))
    rows = indent.replace("\n\n", "\n").join(f"{english}{arrow}{foreign}" for english, foreign in pairs)
    return f"Translate English to {language}:{indent}{rows}"


def _counting(rng: random.Random) -> str:
    """Consecutive numbers, up or down, with one separator."""
    start, count = rng.randint(0, 90), rng.randint(4, 12)
    numbers = [str(number) for number in range(start, start + count)]
    return rng.choice((", ", ", ", " ", "\n")).join(numbers if rng.random() < 0.75 else numbers[::-1])


def _maybe_split(text: str, rng: random.Random) -> list[str]:
    """The text, sometimes in two parts cut after a space, so the model also learns prompts that end in a space."""
    blanks = [i for i, letter in enumerate(text) if letter == " "]
    if blanks and rng.random() < 0.05:
        cut = rng.choice(blanks) + 1
        return [text[:cut], text[cut:]]
    return [text]


def tokenizer_counts(seed: int, sample: int) -> dict[str, int]:
    """Word counts for the tokenizer: common words by frequency rank, prose, and `sample` documents of the corpus."""
    counts: dict[str, float] = {}

    def add(word: str, amount: float) -> None:
        counts[word] = counts.get(word, 0.0) + amount

    for rank, word in enumerate(common_words()):
        share = WORD_SCALE / (rank + ZIPF_OFFSET)
        add(" " + word, share)
        add(word, share / 20)
        if word.islower():
            add(" " + word.capitalize(), share / 40)
            add(word.capitalize(), share / 40)
    for word, count in count_words(prose()).items():
        add(word, count * PROSE_SCALE)
    stream = documents(seed)
    texts = (span.text for _ in range(sample) for span in next(stream) if isinstance(span.text, str))
    for word, count in count_words(texts).items():
        add(word, count * SAMPLE_SCALE)
    return {word: round(count) for word, count in counts.items()}
