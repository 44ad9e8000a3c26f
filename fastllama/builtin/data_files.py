"""Reads the text files under `data/`. Lines that begin with `#` are comments, lines that begin with `@` are headings.

All files of the corpus have one of these forms, so facts and sentences can be added without changing code.
"""

from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).parent / "data"


def lines(name: str) -> Iterator[str]:
    """The lines of `data/NAME` without comments and trailing newlines; "\\n" becomes a line break."""
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield line.replace("\\n", "\n")


def sections(name: str) -> list[tuple[list[str], list[str]]]:
    """[(heading words, non-empty lines)] of a file of `@heading words` lines, each followed by its own lines."""
    parsed: list[tuple[list[str], list[str]]] = []
    for line in lines(name):
        if line.startswith("@"):
            parsed.append((line[1:].split(), []))
        elif line.strip():
            parsed[-1][1].append(line)
    return parsed


def columns(line: str) -> list[str]:
    """The cells of a table row."""
    return [cell.strip(" ") for cell in line.split(" | ")]


def with_article(noun: str) -> str:
    """The noun after "a" or "an", chosen by its first letter: "owl" -> "an owl"."""
    return ("an " if noun[0] in "aeiouAEIOU" else "a ") + noun


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]
