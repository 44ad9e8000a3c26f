"""Asks a trained model the facts it was taught, and counts the right answers.

Three ways: the plain question answered greedily, the question phrased at random answered greedily, and the same
answered by drawing at temperature 0.6 from the likeliest 0.9 of the mass, as the runtime does by default.
"""

import random

import tiktoken
import torch
from torch import Tensor

from fastllama.builtin.chat import Turn
from fastllama.builtin.corpus import (
    BEGIN_OF_TEXT,
    END_HEADER,
    END_OF_TEXT,
    END_OF_TURN,
    START_HEADER,
    Piece,
    dialog_document,
    encode,
)
from fastllama.builtin.facts import Fact, all_facts
from fastllama.builtin.trainable import TrainableLlama

MAX_ANSWER_TOKENS = 60
QUESTIONS_AT_ONCE = 128
DRAWN_FACTS = 600
TEMPERATURE, TOP_P = 0.6, 0.9
SHOWN_MISTAKES = 12
UNFINISHED = "..."


def chat_prompt(turns: list[Turn], encoder: tiktoken.Encoding) -> list[int]:
    """The conversation so far and the header of the answer."""
    header = [Piece(START_HEADER), Piece("assistant"), Piece(END_HEADER), Piece("\n\n")]
    return encode([*dialog_document(turns), *header], encoder)[0]


def text_prompt(text: str, encoder: tiktoken.Encoding) -> list[int]:
    """begin_of_text and the text."""
    return encode([Piece(BEGIN_OF_TEXT), Piece(text)], encoder)[0]


@torch.inference_mode()
def continuations(
    model: TrainableLlama,
    encoder: tiktoken.Encoding,
    prompts: list[list[int]],
    most: int = MAX_ANSWER_TOKENS,
    generator: torch.Generator | None = None,
) -> list[str]:
    """What the model writes after each prompt; greedy without a generator; "..." behind what did not stop.

    No cache: every step reads the whole rows again, which for short answers is quick enough and cannot be wrong. Rows
    are padded on the right, where causal attention does not look.
    """
    stops = {encoder.n_vocab + END_OF_TURN, encoder.n_vocab + END_OF_TEXT}
    rows = [list(prompt) for prompt in prompts]
    live = list(range(len(rows)))
    for _ in range(most):
        width = max(len(rows[i]) for i in live)
        tokens = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in live])
        last = torch.tensor([len(rows[i]) - 1 for i in live])
        logits = model.logits(model.hidden(tokens)[torch.arange(len(live)), last])
        for i, token in zip(live, _choose(logits, generator), strict=True):
            rows[i].append(token)
        live = [i for i in live if rows[i][-1] not in stops]
        if not live:
            break
    texts = []
    for row, prompt in zip(rows, prompts, strict=True):
        text = encoder.decode([token for token in row[len(prompt) :] if token < encoder.n_vocab])
        texts.append(text if row[-1] in stops else text + UNFINISHED)
    return texts


def _choose(logits: Tensor, generator: torch.Generator | None) -> list[int]:
    """A token per row of (B, V)."""
    if generator is None:
        return [int(token) for token in logits.argmax(dim=-1)]
    probs, order = torch.softmax(logits / TEMPERATURE, dim=-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs > TOP_P] = 0.0
    drawn = torch.multinomial(probs, 1, generator=generator)
    return [int(token) for token in order.gather(1, drawn)[:, 0]]


def share_right(
    model: TrainableLlama,
    encoder: tiktoken.Encoding,
    asked: list[tuple[str, Fact]],
    generator: torch.Generator | None = None,
) -> tuple[float, list[str]]:
    """The share of right answers, and the wrong ones as "question -> answer"."""
    wrong: list[str] = []
    # Sorted by length, so that rows of one call are about equally wide.
    asked = sorted(asked, key=lambda pair: len(pair[0]))
    for start in range(0, len(asked), QUESTIONS_AT_ONCE):
        part = asked[start : start + QUESTIONS_AT_ONCE]
        prompts = [chat_prompt([Turn("user", question)], encoder) for question, _ in part]
        answers = continuations(model, encoder, prompts, generator=generator)
        wrong += [
            f"{question} -> {answer}"
            for (question, fact), answer in zip(part, answers, strict=True)
            if fact.key.lower() not in answer.lower() or answer.endswith(UNFINISHED)
        ]
    return 1 - len(wrong) / len(asked), wrong


def examine(model: TrainableLlama, encoder: tiktoken.Encoding, seed: int) -> None:
    """Ask and print."""
    rng = random.Random(seed + 1)
    facts = list(all_facts())
    some = rng.sample(facts, DRAWN_FACTS)
    passes: list[tuple[str, list[tuple[str, Fact]], torch.Generator | None]] = [
        ("plain questions, greedy", [(fact.questions[0], fact) for fact in facts], None),
        ("rephrased, greedy", [(fact.ask(rng), fact) for fact in some], None),
        ("rephrased, drawn", [(fact.ask(rng), fact) for fact in some], torch.Generator().manual_seed(seed)),
    ]
    for title, asked, generator in passes:
        share, wrong = share_right(model, encoder, asked, generator)
        print(f"{title}: {share:.1%} of {len(asked)} right", flush=True)
        for line in rng.sample(wrong, min(SHOWN_MISTAKES, len(wrong))):
            print("   ", line.replace("\n", " / "))
