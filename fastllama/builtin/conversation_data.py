"""Reads the conversation material under `data/`: small talk, cities, common words, unknown topics and styles."""

from dataclasses import dataclass
from functools import cache

from fastllama.builtin.data_files import columns, lines, sections


@dataclass(frozen=True)
class SmallTalk:
    """A block of `data/chat.txt`. Every answer fits every question."""

    weight: float
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class City:
    """A city and its sights, each as (name, what it is, why it is great)."""

    name: str
    known_for: str
    sights: tuple[tuple[str, str, str], ...]


@cache
def small_talk() -> tuple[SmallTalk, ...]:
    """The blocks of `data/chat.txt`."""
    talks = []
    for block in "\n".join(line.replace("\n", "\\n") for line in lines("chat.txt")).split("\n\n"):
        rows = [(line[0], line[1:].strip().replace("\\n", "\n")) for line in block.splitlines() if line]
        if rows:
            by_sign = {sign: tuple(text for mark, text in rows if mark == sign) for sign in "*?!"}
            talks.append(SmallTalk(float((by_sign["*"] or ("1",))[0]), by_sign["?"], by_sign["!"]))
    return tuple(talks)


@cache
def cities() -> dict[str, City]:
    """The cities of `data/cities.txt` by name."""
    cities_by_name: dict[str, City] = {}
    name = ""
    for line in lines("cities.txt"):
        cells = columns(line[2:])
        if line.startswith("= "):
            name = cells[0]
            cities_by_name[name] = City(name, cells[1], ())
        else:
            city = cities_by_name[name]
            cities_by_name[name] = City(name, city.known_for, (*city.sights, (cells[0], cells[1], cells[2])))
    return cities_by_name


@cache
def common_words() -> tuple[str, ...]:
    """The words of `data/words.txt`, most frequent first, without duplicates."""
    return tuple(dict.fromkeys(word for line in lines("words.txt") for word in line.split()))


@cache
def unknowns() -> dict[str, list[str]]:
    """The lists in `data/unknown.txt`: questions, words, surnames and answers."""
    return {heading[0]: body for heading, body in sections("unknown.txt")}


@cache
def styles() -> dict[str, list[str]]:
    """The lists in `data/styles.txt`: the system messages of each style, and its answers."""
    return {" ".join(heading): body for heading, body in sections("styles.txt")}
