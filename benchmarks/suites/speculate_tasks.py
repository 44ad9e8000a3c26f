"""The prompts of the speculate suite: tasks whose answers repeat parts of the prompt, and others.

They are worded so that models of 100 million parameters understand them.
"""

from typing import NamedTuple


class Task(NamedTuple):
    """A request to the model. copies: whether a good answer repeats much of it."""

    text: str
    copies: bool


_REPORT = (
    "The ferry to the island leaves the old harbour at seven in the morning and at four in the afternoon. In "
    "winter the morning ferry does not run on Sundays. Tickets are sold at the kiosk beside the lighthouse, and "
    "only in cash. Dogs travel free of charge, but they must stay on the lower deck. The crossing takes fifty "
    "minutes in calm weather. When the wind is strong, the captain may wait until it drops, and passengers are "
    "asked to stay near the pier. The island has one shop, which closes at noon, and a well whose water is safe "
    "to drink."
)
_CODE = """def load_settings(path):
    settings = {}
    with open(path) as file:
        for line in file:
            name, value = line.split("=")
            settings[name.strip()] = value.strip()
    return settings


def save_settings(path, settings):
    with open(path, "w") as file:
        for name, value in settings.items():
            file.write(f"{name} = {value}\\n")


def print_settings(settings):
    for name, value in settings.items():
        print(name, value)
"""
_RECORDS = """order 1041: Mira Novak, 3 lamps, 59.70, paid, ships to Ljubljana
order 1042: Tomas Lind, 1 desk, 240.00, unpaid, ships to Uppsala
order 1043: Awa Diop, 12 chairs, 1140.00, paid, ships to Dakar
order 1044: Peter Kovacs, 2 shelves, 98.50, paid, ships to Szeged
order 1045: Lucia Romero, 1 sofa, 799.00, unpaid, ships to Sevilla
"""

TASKS = {
    "quotation": Task(f"Repeat the following text word for word:\n\n{_REPORT}", True),
    "code edit": Task(
        f"```python\n{_CODE}```\n\nWrite out this code again, and rename print_settings to show_settings.", True
    ),
    "extraction": Task(f"{_RECORDS}\nList the name and the city of every order.", True),
    "story": Task("Write a short story about a beekeeper who finds a letter in one of her hives.", False),
    "explanation": Task("Explain to a pupil of twelve years why the sea is salty and rivers are not.", False),
    "ideas": Task("I have a free afternoon and a small balcony. What could I do? Answer in a few paragraphs.", False),
}


def prompts_of(group: str, n_rows: int) -> list[str]:
    """The texts of so many rows: a task's own, or those of "copying", "other" or "mixed" tasks in turn."""
    if group in TASKS:
        return [TASKS[group].text] * n_rows
    kinds = {"copying": (True,), "other": (False,), "mixed": (True, False)}[group]
    texts = {kind: [task.text for task in TASKS.values() if task.copies == kind] for kind in kinds}
    return [texts[kinds[row % len(kinds)]][row // len(kinds) % len(texts[kinds[0]])] for row in range(n_rows)]


def groups_of(n_rows: int) -> list[str]:
    """What is measured with so many rows: each task alone, or groups of tasks together."""
    return list(TASKS) if n_rows == 1 else ["copying", "other", "mixed"]
