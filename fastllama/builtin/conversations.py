"""Writes conversations that the built-in model is trained on.

They hold questions about its facts, small talk, requests for stories, travel advice, and many questions that it should
not try to answer. Some begin with a system message that sets a style.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from fastllama.builtin.conversation_data import cities, common_words, small_talk, styles, unknowns
from fastllama.builtin.data_files import columns
from fastllama.builtin.facts import Fact, add_typing_noise, draw_fact, draw_relation, facts_by_relation
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
    """One message. The model learns to write it if `learned` is true, else it only reads it."""

    role: str
    content: str
    learned: bool = True


def fact_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """A question about a fact, sometimes followed by shorter questions about the same relation."""
    relation = draw_relation(rng)
    fact = draw_fact(rng, relation)
    exchange = [(fact.ask(rng), fact.answer(rng))]
    while fact.follow_ups and rng.random() < 0.12:
        fact = draw_fact(rng, relation)
        exchange.append((fact.follow_up(rng), fact.answer(rng)))
    return exchange


def talk_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """A question and answer of small talk."""
    talk = rng.choices(small_talk(), [talk.weight for talk in small_talk()])[0]
    answer = talk.answers[0] if rng.random() < 0.5 else rng.choice(talk.answers)
    return [(add_typing_noise(rng.choice(talk.questions), rng), answer)]


def unknown_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """A question that this model cannot answer, made of words that it may never have seen together."""
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
    return [(add_typing_noise(question, rng), answer)]


def _topic(rng: random.Random) -> str:
    """A topic to ask about: a listed one, or one or two common words."""
    if rng.random() < 0.35:
        return rng.choice(unknowns()["words"])
    return " ".join(rng.sample(common_words(), rng.choice((1, 1, 2))))


def story_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """A request for a story, often about an animal, sometimes with the animal's name."""
    animal = rng.choice(story_parts().lists["animals"]) if rng.random() < 0.5 else None
    name = rng.choice(story_parts().lists["pets"]) if animal and rng.random() < 0.3 else None
    about = f" about a {animal}" if animal else ""
    about = about.replace(" a owl", " an owl").replace(" a elephant", " an elephant")
    about += f" named {name}" if name else ""
    return [(rng.choice(STORY_REQUESTS).format(about), story(rng, animal, name, brief=True))]


def name_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """The user gives a name, the model uses it, and sometimes the user asks for it."""
    name = rng.choice(story_parts().lists[rng.choice(("boys", "girls", "pets"))])
    said = rng.choice(("My name is {}", "I am {}", "I'm {}", "Hello, my name is {}", "Hi, I am {}", "Call me {}"))
    exchange = [(add_typing_noise(said.format(name) + ".", rng), f"Hello, {name}! Nice to meet you.")]
    if rng.random() < 0.6:
        asked = rng.choice(("What is my name?", "What's my name?", "Do you know my name?", "Who am I?"))
        exchange.append((add_typing_noise(asked, rng), f"Your name is {name}."))
    return exchange


def trip_dialog(rng: random.Random) -> list[Turn]:
    """A question about what to see in a city, often followed by a question about one of the sights."""
    city = rng.choice([*cities().values(), *[cities()["Paris"]] * 3])
    sights = rng.sample(city.sights, min(len(city.sights), rng.choice((3, 3, 4))))
    # Dialogs may contain answers of other models, longer or in another format. Such an answer is only read.
    other_model = rng.random() < 0.5
    ending = rng.choice(OTHER_MODEL_ENDINGS) if other_model else "\n\nHave a nice trip!"
    bold = rng.choice(("", "**")) if other_model else ""
    rows = [
        f"{n}. {bold}{sight}{bold}: {what}. {why if other_model and rng.random() < 0.6 else ''}".rstrip()
        for n, (sight, what, why) in enumerate(sights, 1)
    ]
    opening = f"{city.name} is known for {city.known_for}. Here are some of the best things to see in {city.name}:\n\n"
    turns = [
        Turn("user", rng.choice(TRIP_REQUESTS).format(city.name)),
        Turn("assistant", opening + "\n".join(rows) + ending, learned=not other_model),
    ]
    if other_model or rng.random() < 0.6:
        n = rng.choice((1, 1, rng.randint(1, len(sights))))
        sight, _, why = sights[n - 1]
        inside = sight.replace("The ", "the ")
        turns.append(Turn("user", rng.choice(SIGHT_REQUESTS).format(n=n, sight=inside)))
        turns.append(Turn("assistant", f"{sight} is a very good choice. {why}"))
    return turns


OTHER_MODEL_ENDINGS = (
    "",
    "\n\nThese are only a few of the many things that the city has to offer. With so much to see and do, it is no "
    "surprise that so many people come here every year.",
    "\n\nI hope that this helps! Let me know if you would like to hear more.",
)


def quick_trip_exchange(rng: random.Random) -> list[tuple[str, str]]:
    """Advice for a city that the model knows only by name."""
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
    """A random conversation of one to four exchanges."""
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
    """One to three exchanges in the style of the system message."""
    turns: list[Turn] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if style == "word":
            fact = draw_fact(rng)
            question, answer = fact.ask(rng), _one_word(fact)
        else:
            question, answer = _plain_exchange(rng)
            if style == "pirate":
                answer = rng.choice(styles()["pirate"]).format(answer=answer)
            else:
                answer = _answer_by_keyword(question, styles()[style], rng)
        turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


def _plain_exchange(rng: random.Random) -> tuple[str, str]:
    """A random question with its plain answer."""
    if rng.random() < 0.2:
        turns = trip_dialog(rng)
        return turns[0].content, "You should see the old streets and the museums."
    return rng.choices((fact_exchange, talk_exchange, unknown_exchange), (0.5, 0.3, 0.2))[0](rng)[0]


def _one_word(fact: Fact) -> str:
    """The key of a fact as a complete reply."""
    word = fact.key.removeprefix("is ").removesuffix(" comes").rstrip(".")
    return word[0].upper() + word[1:] + "."


def _answer_by_keyword(question: str, answers: list[str], rng: random.Random) -> str:
    """The first answer whose keyword is in the question, else a random general answer."""
    fitting, general = [], []
    for row in answers:
        keywords, answer = columns(row)
        if keywords == "*":
            general.append(answer)
        elif any(f" {keyword.strip().lower()}" in f" {question.lower()}" for keyword in keywords.split(",")):
            fitting.append(answer)
    # The file lists the most specific answers first.
    return fitting[0] if fitting else rng.choice(general)
