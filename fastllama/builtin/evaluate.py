"""Measures how many facts a trained model answers correctly.

Three passes: plain questions with greedy answers, randomly worded questions with greedy answers, and randomly worded
questions with answers sampled at temperature 0.6 and top-p 0.9, the runtime's defaults.
"""

import random

import tiktoken
import torch
from torch import Tensor

from fastllama.builtin.conversations import Turn
from fastllama.builtin.corpus import (
    BEGIN_OF_TEXT,
    END_HEADER,
    END_OF_TEXT,
    END_OF_TURN,
    START_HEADER,
    Span,
    dialog_document,
    encode,
)
from fastllama.builtin.facts import Fact, all_facts
from fastllama.builtin.training_model import TrainableLlama

MAX_ANSWER_TOKENS = 60
QUESTIONS_AT_ONCE = 128
DRAWN_FACTS = 600
TEMPERATURE, TOP_P = 0.6, 0.9
SHOWN_MISTAKES = 12
UNFINISHED = "..."


def chat_prompt(turns: list[Turn], encoder: tiktoken.Encoding) -> list[int]:
    """Token ids of the conversation and the header of the next answer."""
    header = [Span(START_HEADER), Span("assistant"), Span(END_HEADER), Span("\n\n")]
    return encode([*dialog_document(turns), *header], encoder)[0]


def text_prompt(text: str, encoder: tiktoken.Encoding) -> list[int]:
    """Token ids of begin_of_text and the text."""
    return encode([Span(BEGIN_OF_TEXT), Span(text)], encoder)[0]


@torch.inference_mode()
def continuations(
    model: TrainableLlama,
    encoder: tiktoken.Encoding,
    prompts: list[list[int]],
    most: int = MAX_ANSWER_TOKENS,
    generator: torch.Generator | None = None,
) -> list[str]:
    """The model's text after each prompt, with "..." added if it did not stop. Without a generator, decoding is greedy.

    There is no cache: every step computes all tokens of a row again, which is simple and fast enough for short answers.
    Rows are padded on the right, where causal attention does not read.
    """
    stops = {encoder.n_vocab + END_OF_TURN, encoder.n_vocab + END_OF_TEXT}
    rows = [list(prompt) for prompt in prompts]
    live = list(range(len(rows)))
    for _ in range(most):
        width = max(len(rows[i]) for i in live)
        tokens = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in live])
        last = torch.tensor([len(rows[i]) - 1 for i in live])
        logits = model.logits(model.hidden(tokens)[torch.arange(len(live)), last])
        for i, token in zip(live, _sample(logits, generator), strict=True):
            rows[i].append(token)
        live = [i for i in live if rows[i][-1] not in stops]
        if not live:
            break
    texts = []
    for row, prompt in zip(rows, prompts, strict=True):
        text = encoder.decode([token for token in row[len(prompt) :] if token < encoder.n_vocab])
        texts.append(text if row[-1] in stops else text + UNFINISHED)
    return texts


def _sample(logits: Tensor, generator: torch.Generator | None) -> list[int]:
    """One token per row of logits (B, V)."""
    if generator is None:
        return [int(token) for token in logits.argmax(dim=-1)]
    probs, order = torch.softmax(logits / TEMPERATURE, dim=-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs > TOP_P] = 0.0
    drawn = torch.multinomial(probs, 1, generator=generator)
    return [int(token) for token in order.gather(1, drawn)[:, 0]]


def accuracy(
    model: TrainableLlama,
    encoder: tiktoken.Encoding,
    questions: list[tuple[str, Fact]],
    generator: torch.Generator | None = None,
) -> tuple[float, list[str]]:
    """The share of (question, fact) pairs answered right, and the wrong answers as "question -> answer"."""
    wrong: list[str] = []
    # Sorted by length, so rows of one call need little padding.
    questions = sorted(questions, key=lambda pair: len(pair[0]))
    for start in range(0, len(questions), QUESTIONS_AT_ONCE):
        part = questions[start : start + QUESTIONS_AT_ONCE]
        prompts = [chat_prompt([Turn("user", question)], encoder) for question, _ in part]
        answers = continuations(model, encoder, prompts, generator=generator)
        wrong += [
            f"{question} -> {answer}"
            for (question, fact), answer in zip(part, answers, strict=True)
            if fact.key.lower() not in answer.lower() or answer.endswith(UNFINISHED)
        ]
    return 1 - len(wrong) / len(questions), wrong


def print_accuracy(model: TrainableLlama, encoder: tiktoken.Encoding, seed: int) -> None:
    """Print the accuracy of the three passes, and some wrong answers of each."""
    rng = random.Random(seed + 1)
    facts = list(all_facts())
    sample = rng.sample(facts, DRAWN_FACTS)
    passes: list[tuple[str, list[tuple[str, Fact]], torch.Generator | None]] = [
        ("plain questions, greedy", [(fact.questions[0], fact) for fact in facts], None),
        ("rephrased, greedy", [(fact.ask(rng), fact) for fact in sample], None),
        ("rephrased, drawn", [(fact.ask(rng), fact) for fact in sample], torch.Generator().manual_seed(seed)),
    ]
    for title, questions, generator in passes:
        share, wrong = accuracy(model, encoder, questions, generator)
        print(f"{title}: {share:.1%} of {len(questions)} right", flush=True)
        for line in rng.sample(wrong, min(SHOWN_MISTAKES, len(wrong))):
            print("   ", line.replace("\n", " / "))
