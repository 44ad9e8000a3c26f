"""Types of command-line parameters: numbers, texts, names, and lists of numbers or names."""

import math
from typing import Any

import click

from fastllama.cli import standard_streams


class Number(click.ParamType):
    """A finite number of at least zero."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not math.isfinite(number) or number < 0:
            self.fail(f"{value} is not a finite number of at least 0.", param, ctx)
        return number


class IntegerOr(click.ParamType):
    """A whole number from `least` to `most`, or a word."""

    name = "n"

    def __init__(self, word: str, least: int, most: int) -> None:
        self.word, self.least, self.most = word, least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == self.word:
            return self.word
        try:
            number = int(value)
        except ValueError:
            number = self.least - 1
        if not self.least <= number <= self.most:
            self.fail(f"{value!r} is neither {self.word} nor a number from {self.least} to {self.most}.", param, ctx)
        return number


class Text(click.ParamType):
    """Text for the model, always valid Unicode."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return standard_streams.decoded_argument(str(value))


class Choice(click.Choice[str]):
    """One of some names, shown as they are written; hyphens and underscores in it are the same to type."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """The name that was meant, or what was typed."""
        typed = str(choice).replace("-", "_")
        return next((name for name in self.choices if name.replace("-", "_") == typed), str(choice))


class Integers(click.ParamType):
    """Positive integers separated by commas -> a tuple of them."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers separated by commas.", param, ctx)
        if min(numbers) < 1:
            self.fail(f"{value!r} holds a number below 1.", param, ctx)
        return numbers


class Names(click.ParamType):
    """Names from `known`, separated by commas -> a tuple of them, each once."""

    name = "name,..."

    def __init__(self, *known: str) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(part.strip() for part in str(value).split(","))
        for name in names:
            if name not in self.known:
                self.fail(f"{name!r} is not one of {', '.join(self.known)}.", param, ctx)
        return tuple(dict.fromkeys(names))
