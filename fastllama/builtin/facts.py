"""The facts that the built-in model learns: each with its questions and answers.

Most come from `data/facts.txt`. Sums, differences, and next and previous numbers are computed here. At the end of
training, the same facts are used to print how many answers are right.
"""

import random
import re
from dataclasses import dataclass
from functools import cache

from fastllama.builtin.data_files import columns, sections, sentence, with_article

NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
MAX_SUMMAND = 10
MAX_COUNTED = 50

CLAUSE_FRAMES = (
    "Tell me {}.",
    "Tell me {}",
    "Please tell me {}.",
    "Can you tell me {}?",
    "Could you tell me {}?",
    "Could you please tell me {}?",
    "Do you know {}?",
    "I want to know {}.",
    "I would like to know {}.",
)
USUAL_ANSWER_SHARE = 0.8


@dataclass(frozen=True)
class Fact:
    """One fact with all its texts. A right answer contains `key`."""

    relation: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    key: str
    clauses: tuple[str, ...] = ()
    follow_ups: tuple[str, ...] = ()
    statements: tuple[str, ...] = ()

    def ask(self, rng: random.Random) -> str:
        """A question for this fact, in random wording."""
        if self.clauses and rng.random() < 0.35:
            question = rng.choice(CLAUSE_FRAMES).format(rng.choice(self.clauses))
        else:
            # The first wording is the most common one.
            question = self.questions[0] if rng.random() < 0.3 else rng.choice(self.questions)
        return add_typing_noise(sentence(question), rng)

    def follow_up(self, rng: random.Random) -> str:
        """A question that refers to the previous one: "And of Spain?"."""
        return add_typing_noise(sentence(rng.choice(self.follow_ups)), rng)

    def answer(self, rng: random.Random) -> str:
        """The answer as a sentence: the first one with probability USUAL_ANSWER_SHARE."""
        usual = len(self.answers) == 1 or rng.random() < USUAL_ANSWER_SHARE
        return sentence(self.answers[0] if usual else rng.choice(self.answers[1:]))


def add_typing_noise(question: str, rng: random.Random) -> str:
    """The question as people may type it: in lower case, without question mark, with "please" or a greeting."""
    if rng.random() < 0.3:
        question = question.replace(" the United", " United").replace(" the Nether", " Nether")
    if rng.random() < 0.05:
        question = question.rstrip("?. ") + rng.choice((", please?", ", please.", " please", " please?"))
    if rng.random() < 0.05:
        question = rng.choice(("Hello, ", "Hi! ", "Hi, ", "Please: ", "Question: ", "Ok, ", "And ")) + question
    if rng.random() < 0.25:
        question = question.rstrip("?.! ")
    style = rng.random()
    if style < 0.22:
        return question.lower()
    return question[0].lower() + question[1:] if style < 0.3 else question


@cache
def facts_by_relation() -> dict[str, tuple[float, tuple[Fact, ...]]]:
    """relation -> (weight in draws, its facts)."""
    tables: dict[str, list[list[str]]] = {}
    relations: dict[str, tuple[float, tuple[Fact, ...]]] = {}
    for heading, body in sections("facts.txt"):
        if heading[0] == "table":
            tables[heading[1]] = [columns(line) for line in body]
        else:
            _, name, table, weight = heading
            rows = (_fact_from_row(name, body, row) for row in tables[table])
            relations[name] = float(weight), tuple(fact for fact in rows if fact is not None)
    return relations | _number_facts()


def _number_facts() -> dict[str, tuple[float, tuple[Fact, ...]]]:
    """Sums of two small numbers, the inverse differences, and next and previous numbers."""
    small = range(MAX_SUMMAND + 1)
    return {
        "sum": (16.0, tuple(_sum(a, b) for a in small for b in small)),
        "difference": (14.0, tuple(_difference(a + b, b) for a in small for b in small)),
        "successor": (5.0, tuple(_adjacent_number(n, n + 1) for n in range(MAX_COUNTED))),
        "predecessor": (4.0, tuple(_adjacent_number(n, n - 1) for n in range(1, MAX_COUNTED + 1))),
    }


@cache
def all_facts() -> tuple[Fact, ...]:
    """Every fact once, in a fixed order."""
    return tuple(fact for _, facts in facts_by_relation().values() for fact in facts)


def draw_relation(rng: random.Random) -> str:
    """The name of a relation drawn by weight."""
    relations = facts_by_relation()
    return rng.choices(list(relations), [weight for weight, _ in relations.values()])[0]


def draw_fact(rng: random.Random, relation: str | None = None) -> Fact:
    """A random fact of the given relation, or of a relation drawn by weight."""
    return rng.choice(facts_by_relation()[relation or draw_relation(rng)][1])


def _fact_from_row(name: str, templates: list[str], row: list[str]) -> Fact | None:
    """One table row, filled into a relation's templates; None if a cell that they use is "-"."""
    used = {int(column) for line in templates for column in re.findall(r"\{a?(\d)\}", line)}
    if any(row[column] == "-" for column in used):
        return None
    cells = {f"a{i}": with_article(cell) for i, cell in enumerate(row)}
    by_sign: dict[str, list[str]] = {sign: [] for sign in "?~&!.="}
    for line in templates:
        by_sign[line[0]].append(line[2:].format(*row, **cells))
    default_key = row[1] if len(row) > 1 else row[0]
    return Fact(
        relation=name,
        questions=tuple(by_sign["?"]),
        answers=tuple(by_sign["!"]),
        key=by_sign["="][0] if by_sign["="] else default_key,
        clauses=tuple(by_sign["~"]),
        follow_ups=tuple(by_sign["&"]),
        statements=tuple(sentence(text) for text in by_sign["."]),
    )


def _sum(a: int, b: int) -> Fact:
    return Fact(
        relation="sum",
        questions=(
            f"What is {a} + {b}?",
            f"What is {a} plus {b}?",
            f"How much is {a} + {b}?",
            f"How much is {a} plus {b}?",
            f"What's {a} + {b}?",
            f"{a} + {b}",
            f"{a} + {b} = ?",
            f"{a}+{b}",
            f"{a}+{b}=",
            f"What is {NUMBER_WORDS[a]} plus {NUMBER_WORDS[b]}?",
        ),
        answers=(f"{a} plus {b} is {a + b}.",),
        key=f"is {a + b}.",
        clauses=(f"how much {a} plus {b} is", f"what {a} + {b} is"),
        follow_ups=(f"And {a} + {b}?", f"And {a} plus {b}?"),
        statements=(f"{a} plus {b} is {a + b}.", f"{a} + {b} = {a + b}"),
    )


def _difference(a: int, b: int) -> Fact:
    return Fact(
        relation="difference",
        questions=(
            f"What is {a} - {b}?",
            f"What is {a} minus {b}?",
            f"How much is {a} - {b}?",
            f"How much is {a} minus {b}?",
            f"What's {a} - {b}?",
            f"{a} - {b}",
            f"{a} - {b} = ?",
            f"{a}-{b}",
            f"What is {NUMBER_WORDS[a]} minus {NUMBER_WORDS[b]}?",
        ),
        answers=(f"{a} minus {b} is {a - b}.",),
        key=f"is {a - b}.",
        clauses=(f"how much {a} minus {b} is", f"what {a} - {b} is"),
        follow_ups=(f"And {a} - {b}?", f"And {a} minus {b}?"),
        statements=(f"{a} minus {b} is {a - b}.", f"{a} - {b} = {a - b}"),
    )


def _adjacent_number(number: int, other: int) -> Fact:
    side = "after" if other > number else "before"
    return Fact(
        relation="successor" if other > number else "predecessor",
        questions=(
            f"What number comes {side} {number}?",
            f"Which number comes {side} {number}?",
            f"What comes {side} {number}?",
            f"What is the number {side} {number}?",
            f"What is the {'next' if other > number else 'previous'} number {side} {number}?",
        ),
        answers=(f"{other} comes {side} {number}.",),
        key=f"{other} comes",
        clauses=(f"which number comes {side} {number}",),
        follow_ups=(f"And {side} {number}?",),
        statements=(f"{other} comes {side} {number}.",),
    )
