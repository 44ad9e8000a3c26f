"""Writes short stories from the parts in `data/stories.txt`.

A story has a hero and a friend, an opening, sometimes a sentence about the hero, the steps of one plot and an ending.
Names, pronouns and things are drawn once per story.
"""

import random
from dataclasses import dataclass
from functools import cache

from fastllama.builtin.data_files import sections, sentence, with_article

ONCE_UPON_SHARE = 0.65
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}


@dataclass(frozen=True)
class Parts:
    """`data/stories.txt`: placeholder values, templates by part, and plots as lists of (optional, alternatives)."""

    lists: dict[str, list[str]]
    parts: dict[str, list[str]]
    plots: dict[str, list[tuple[bool, list[str]]]]


@cache
def story_parts() -> Parts:
    """`data/stories.txt`, parsed once."""
    parsed = Parts({}, {}, {})
    for (shape, name), body in sections("stories.txt"):
        if shape == "plot":
            steps: dict[str, list[str]] = {}
            for line in body:
                number, text = line.split(" ", 1)
                steps.setdefault(number, []).append(text)
            parsed.plots[name] = [(number.endswith("?"), texts) for number, texts in steps.items()]
        else:
            (parsed.lists if shape == "list" else parsed.parts)[name] = body
    return parsed


def story(rng: random.Random, animal: str | None = None, name: str | None = None, brief: bool = False) -> str:
    """A story of 60 to 180 words in one or two paragraphs, with the given animal and name of the hero, if any."""
    parts = story_parts()
    values = _draw_placeholders(rng, animal, name)
    opening = rng.choice(parts.parts["opening" if rng.random() < ONCE_UPON_SHARE else "other_opening"])
    beginning = [opening]
    if not brief or rng.random() < 0.5:
        beginning += rng.sample(parts.parts["about"], rng.choice((1, 1, 2)))
    steps = list(parts.plots[rng.choice(list(parts.plots))])
    middle = [rng.choice(texts) for optional, texts in steps if not optional or rng.random() < 0.5]
    ending = [rng.choice(parts.parts["ending"])] if rng.random() < 0.85 else []
    filled = [[_fill(text, values) for text in group] for group in (beginning, middle, ending)]
    if brief or rng.random() < 0.5:
        return " ".join(filled[0] + filled[1] + filled[2])
    cut = rng.randrange(2, len(filled[1]) - 1)
    return "\n\n".join((" ".join(filled[0] + filled[1][:cut]), " ".join(filled[1][cut:] + filled[2])))


def _draw_placeholders(rng: random.Random, animal: str | None, name: str | None) -> dict[str, str]:
    """The value of each placeholder in this story."""
    lists = story_parts().lists
    values: dict[str, str] = {}
    hero_is, he, hero_name = _character(rng, animal)
    hero_name = name or hero_name
    friend_is, she, friend_name = _character(rng, None)
    while friend_name == hero_name or friend_is.split()[-1] == hero_is.split()[-1]:
        friend_is, she, friend_name = _character(rng, None)
    values["kind"], values["name"] = hero_is, hero_name
    values["fkind"], values["friend"] = friend_is, friend_name
    values["he"], values["him"], values["his"] = PRONOUNS[he]
    values["hisown"] = "his" if he == "he" else "hers"
    values["she"], values["her"], values["hers"] = PRONOUNS[she]
    # The hero's mother.
    values["she2"], values["her2"] = "she", "her"
    for key, source in (("place", "places"), ("thing", "toys"), ("food", "foods")):
        values[key], values[key + "2"] = rng.sample(lists[source], 2)
    values["foodb"] = values["food2"].removeprefix("a ")
    child = hero_is.endswith(("boy", "girl"))
    values["home"] = rng.choice(lists["homes" if child else "animal_homes"])
    for key, source in (("feel", "feelings"), ("good", "virtues"), ("weather", "weather"), ("helper", "helpers")):
        values[key] = rng.choice(lists[source])
    values |= {sentence(key): sentence(values[key]) for key in ("he", "his", "she")}
    return values


def _character(rng: random.Random, animal: str | None) -> tuple[str, str, str]:
    """(description, pronoun, name) of a child or an animal."""
    lists = story_parts().lists
    pronoun = rng.choice(("he", "she"))
    if animal is None and rng.random() < 0.5:
        child = "boy" if pronoun == "he" else "girl"
        return f"{rng.choice(lists['child_adj'])} {child}", pronoun, rng.choice(lists[child + "s"])
    kind = animal or rng.choice(lists["animals"])
    named = rng.choice(lists["pets"] if rng.random() < 0.75 else lists["boys" if pronoun == "he" else "girls"])
    return f"{rng.choice(lists['animal_adj'])} {kind}", pronoun, named


def _fill(text: str, values: dict[str, str]) -> str:
    """The sentence with its placeholders filled; "a" becomes "an" before a vowel."""
    for key in ("kind", "fkind", "thing", "thing2"):
        noun = with_article(values[key])
        text = text.replace(f"a {{{key}}}", noun).replace(f"A {{{key}}}", sentence(noun))
    return text.format_map(values)
