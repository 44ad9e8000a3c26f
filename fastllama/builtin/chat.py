"""Conversations for the built-in model to learn from.

Questions about its facts, small talk, requests for stories, advice for a trip, and many questions that it should not
try to answer; some of them under a system message that asks for a style.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from fastllama.builtin.data_files import columns, lines, sections
from fastllama.builtin.facts import Fact, draw_fact, draw_relation, facts_by_relation, roughen
from fastllama.builtin.stories import story, story_parts

SYSTEM_SHARE = 0.3
STYLES = {"plain": 0.5, "haiku": 0.18, "emoji": 0.14, "pirate": 0.09, "word": 0.09}
STORY_REQUESTS = (
    "Tell me a story{}.",
    "Tell me a story{}",
    "tell me a story{}",
    "Please tell me a story{}.",
    "Can you tell me a story{}?",
    "Write a story{}.",
    "Write a short story{}.",
    "I want to hear a story{}.",
    "Tell me a short story{}",
    "Do you know a story{}?",
    "A story{} please",
)
TRIP_REQUESTS = (
    "I am going to {}, what should I see?",
    "I am going to {}. What should I see?",
    "I'm going to {}, what should I see?",
    "What should I see in {}?",
    "What can I see in {}?",
    "What are the best things to see in {}?",
    "I will travel to {}. What should I visit?",
    "What should I do in {}?",
)
SIGHT_REQUESTS = (
    "What is so great about #{n}?",
    "What is so great about number {n}?",
    "What's so great about #{n}?",
    "what is so great about #{n}",
    "Tell me more about #{n}.",
    "Why should I see number {n}?",
    "What is so great about {sight}?",
    "Tell me more about {sight}.",
)


@dataclass(frozen=True)
class Turn:
    """One message. The model learns to write the `learned` ones, and only reads the others."""

    role: str
    content: str
    learned: bool = True


@dataclass(frozen=True)
class Talk:
    """A block of `data/chat.txt`: any of the questions may get any of the answers."""

    weight: float
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class City:
    """A city and its sights: (name, what it is, why it is great)."""

    name: str
    known_for: str
    sights: tuple[tuple[str, str, str], ...]


@cache
def small_talk() -> tuple[Talk, ...]:
    """The blocks of `data/chat.txt`."""
    talks = []
    for block in "\n".join(line.replace("\n", "\\n") for line in lines("chat.txt")).split("\n\n"):
        rows = [(line[0], line[1:].strip().replace("\\n", "\n")) for line in block.splitlines() if line]
        if rows:
            by_sign = {sign: tuple(text for mark, text in rows if mark == sign) for sign in "*?!"}
            talks.append(Talk(float((by_sign["*"] or ("1",))[0]), by_sign["?"], by_sign["!"]))
    return tuple(talks)


@cache
def cities() -> dict[str, City]:
    """The cities of `data/cities.txt` by name."""
    found: dict[str, City] = {}
    name = ""
    for line in lines("cities.txt"):
        cells = columns(line[2:])
        if line.startswith("= "):
            name = cells[0]
            found[name] = City(name, cells[1], ())
        else:
            city = found[name]
            found[name] = City(name, city.known_for, (*city.sights, (cells[0], cells[1], cells[2])))
    return found


@cache
def common_words() -> tuple[str, ...]:
    """The words of `data/words.txt`, the most frequent first, each once."""
    return tuple(dict.fromkeys(word for line in lines("words.txt") for word in line.split()))


@cache
def unknowns() -> dict[str, list[str]]:
    """`data/unknown.txt`: questions, words, surnames and answers."""
    return {heading[0]: body for heading, body in sections("unknown.txt")}


@cache
def styles() -> dict[str, list[str]]:
    """`data/styles.txt`: the system messages of each style, and what is answered in it."""
    return {" ".join(heading): body for heading, body in sections("styles.txt")}


def fact_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """A question about a fact, sometimes followed by a shorter one of the same kind."""
    relation = draw_relation(rng)
    fact = draw_fact(rng, relation)
    exchange = [(fact.ask(rng), fact.answer(rng))]
    while fact.follow_ups and rng.random() < 0.12:
        fact = draw_fact(rng, relation)
        exchange.append((fact.follow_up(rng), fact.answer(rng)))
    return exchange


def talk_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """Small talk."""
    talk = rng.choices(small_talk(), [talk.weight for talk in small_talk()])[0]
    answer = talk.answers[0] if rng.random() < 0.5 else rng.choice(talk.answers)
    return [(roughen(rng.choice(talk.questions), rng), answer)]


def unknown_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """A question that is not for this model, made of words it may never have seen together."""
    pools = unknowns()
    question = rng.choice(pools["questions"]).format(
        x=_topic(rng),
        y=_topic(rng),
        name=rng.choice(story_parts().lists[rng.choice(("boys", "girls"))]),
        surname=rng.choice(pools["surnames"]),
        year=rng.randint(900, 2030),
        big=rng.randint(21, 9999),
        big2=rng.randint(21, 999),
    )
    answer = pools["answers"][0] if rng.random() < 0.7 else rng.choice(pools["answers"])
    return [(roughen(question, rng), answer)]


def _topic(rng: random.Random) -> str:
    """Something to ask about: a subject, or one or two common words."""
    if rng.random() < 0.35:
        return rng.choice(unknowns()["words"])
    return " ".join(rng.sample(common_words(), rng.choice((1, 1, 2))))


def story_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """A request for a story, often about an animal, sometimes with its name."""
    animal = rng.choice(story_parts().lists["animals"]) if rng.random() < 0.5 else None
    name = rng.choice(story_parts().lists["pets"]) if animal and rng.random() < 0.3 else None
    about = f" about a {animal}" if animal else ""
    about = about.replace(" a owl", " an owl").replace(" a elephant", " an elephant")
    about += f" named {name}" if name else ""
    return [(rng.choice(STORY_REQUESTS).format(about), story(rng, animal, name, brief=True))]


def name_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """The user says a name; the model uses it, and remembers it when asked."""
    name = rng.choice(story_parts().lists[rng.choice(("boys", "girls", "pets"))])
    said = rng.choice(("My name is {}", "I am {}", "I'm {}", "Hello, my name is {}", "Hi, I am {}", "Call me {}"))
    exchange = [(roughen(said.format(name) + ".", rng), f"Hello, {name}! Nice to meet you.")]
    if rng.random() < 0.6:
        asked = rng.choice(("What is my name?", "What's my name?", "Do you know my name?", "Who am I?"))
        exchange.append((roughen(asked, rng), f"Your name is {name}."))
    return exchange


def trip_dialog(rng: random.Random) -> list[Turn]:
    """What to see in a city, and often a question about one of the answers."""
    city = rng.choice([*cities().values(), *[cities()["Paris"]] * 3])
    sights = rng.sample(city.sights, min(len(city.sights), rng.choice((3, 3, 4))))
    # People also paste answers of other models, longer or in another format: read them, and learn only what follows.
    foreign = rng.random() < 0.5
    ending = rng.choice(FOREIGN_ENDINGS) if foreign else "\n\nHave a nice trip!"
    bold = rng.choice(("", "**")) if foreign else ""
    rows = [
        f"{n}. {bold}{sight}{bold}: {what}. {why if foreign and rng.random() < 0.6 else ''}".rstrip()
        for n, (sight, what, why) in enumerate(sights, 1)
    ]
    opening = f"{city.name} is known for {city.known_for}. Here are some of the best things to see in {city.name}:\n\n"
    turns = [
        Turn("user", rng.choice(TRIP_REQUESTS).format(city.name)),
        Turn("assistant", opening + "\n".join(rows) + ending, learned=not foreign),
    ]
    if foreign or rng.random() < 0.6:
        n = rng.choice((1, 1, rng.randint(1, len(sights))))
        sight, _, why = sights[n - 1]
        inside = sight.replace("The ", "the ")
        turns.append(Turn("user", rng.choice(SIGHT_REQUESTS).format(n=n, sight=inside)))
        turns.append(Turn("assistant", f"{sight} is a very good choice. {why}"))
    return turns


FOREIGN_ENDINGS = (
    "",
    "\n\nThese are only a few of the many things that the city has to offer. With so much to see and do, it is no "
    "surprise that so many people come here every year.",
    "\n\nI hope that this helps! Let me know if you would like to hear more.",
)


def quick_trip_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """Advice for a city of which the model knows only the name."""
    city = rng.choice(facts_by_relation()["capital"][1]).key
    asked = rng.choice(TRIP_REQUESTS).format(city)
    if city in cities():
        return unknown_exchange(rng)
    return [(asked, f"{city} is worth a visit. Walk through the old streets, see a museum, and try the food.")]


EXCHANGES: dict[Callable[[random.Random], list[tuple[str, str]]], float] = {
    fact_exchange: 0.71,
    talk_exchange: 0.12,
    unknown_exchange: 0.09,
    story_exchange: 0.045,
    name_exchange: 0.025,
    quick_trip_exchange: 0.01,
}
TRIP_SHARE = 0.025


def dialog(rng: random.Random) -> list[Turn]:
    """A conversation of one to four exchanges."""
    style = rng.choices(list(STYLES), list(STYLES.values()))[0] if rng.random() < SYSTEM_SHARE else None
    turns = [Turn("system", rng.choice(styles()[f"systems {style}"]))] if style else []
    if style not in (None, "plain"):
        return turns + _styled(rng, str(style))
    if rng.random() < TRIP_SHARE:
        return turns + trip_dialog(rng)
    wanted = rng.choices((1, 2, 3, 4), (0.5, 0.22, 0.16, 0.12))[0]
    exchanges: list[tuple[str, str]] = []
    while len(exchanges) < wanted:
        exchanges += rng.choices(list(EXCHANGES), list(EXCHANGES.values()))[0](rng)
    for question, answer in exchanges[:4]:
        turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


def _styled(rng: random.Random, style: str) -> list[Turn]:
    """One to three exchanges in the style that the system message asks for."""
    turns: list[Turn] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if style == "word":
            fact = draw_fact(rng)
            question, answer = fact.ask(rng), _one_word(fact)
        else:
            question, answer = _any_question(rng)
            if style == "pirate":
                answer = rng.choice(styles()["pirate"]).format(answer=answer)
            else:
                answer = _by_keyword(question, styles()[style], rng)
        turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


def _any_question(rng: random.Random) -> tuple[str, str]:
    """A question of any kind with its plain answer."""
    if rng.random() < 0.2:
        turns = trip_dialog(rng)
        return turns[0].content, "You should see the old streets and the museums."
    return rng.choices((fact_exchange, talk_exchange, unknown_exchange), (0.5, 0.3, 0.2))[0](rng)[0]


def _one_word(fact: Fact) -> str:
    """The key of a fact as a reply of its own."""
    word = fact.key.removeprefix("is ").removesuffix(" comes").rstrip(".")
    return word[0].upper() + word[1:] + "."


def _by_keyword(question: str, answers: list[str], rng: random.Random) -> str:
    """An answer whose keyword is in the question, or one that fits all."""
    fitting, general = [], []
    for row in answers:
        keywords, answer = columns(row)
        if keywords == "*":
            general.append(answer)
        elif any(f" {keyword.strip().lower()}" in f" {question.lower()}" for keyword in keywords.split(",")):
            fitting.append(answer)
    # The first match is the most particular one.
    return fitting[0] if fitting else rng.choice(general)
