"""A few steps that check looked-up guesses, by the plain-torch ops: a row whose answer repeats itself."""

from typing import NamedTuple

import torch

from docs.pictures.svg import BLUE, GREEN, GREY, INK, LINE, MUTED, PAPER, Drawing
from fastllama.kernels import checking
from fastllama.kernels.decode_state import DecodeState

PROMPT, ANSWER = (
    text.split()
    for text in ("the red hen and the red fox met . the", "red hen and the red fox sat down and the red hen sang")
)
KEY = ((20, GREY, "newest"), (112, BLUE, "guess"), (196, GREEN, "drawn, kept"), (320, PAPER, "drawn, dropped"))
WORDS = list(dict.fromkeys(PROMPT + ANSWER))
GUESSES, STEPS = 4, 5
LEFT, TOP, CELL, BOX, STEP = 150, 118, 132, 26, 92


class Checked(NamedTuple):
    """What a step feeds, what is drawn after each of these, and how many draws are kept."""

    fed: list[str | None]  # None: no guess
    drawn: list[str]
    kept: int


def simulated() -> list[Checked]:
    """The steps. The model draws the answer's next word wherever it has seen the right ones."""
    tokens, end = [WORDS.index(word) for word in PROMPT], len(PROMPT) + len(ANSWER)
    state = DecodeState.of(1, end + 1, len(WORDS), torch.device("cpu")).with_guesses(end + 1)
    assert state.guesses is not None
    state.start_rows([0], tokens[-1:], [len(tokens) - 1], [len(tokens)], [end - 1])
    state.guesses.set_history(0, tokens)
    checking.look_up(state, GUESSES)
    text, steps = PROMPT + ANSWER, []
    for _ in range(STEPS):
        begin = int(state.positions[0])
        window = checking.window(state, 0, GUESSES + 1)
        drawn = [text[min(begin + 1 + i, end - 1)] for i in range(GUESSES + 1)]
        live = (window.positions >= 0).tolist()
        fed = [WORDS[token] if alive else None for token, alive in zip(window.tokens.tolist(), live, strict=True)]
        checking.accept(state, torch.tensor([WORDS.index(word) for word in drawn]), torch.zeros(GUESSES + 1))
        steps.append(Checked(fed, drawn, int(state.guesses.newest[0]) - begin))
        checking.look_up(state, GUESSES)
    return steps


def draw() -> str:
    """The picture."""
    steps = simulated()
    drawing = Drawing(TOP + STEP * len(steps) + 34, "Five decode steps that check guesses of the next words")
    drawing.text(20, 30, "A step feeds the newest word and guesses, and keeps what they got right", size=17, bold=True)
    drawing.text(20, 54, f"prompt: {' '.join(PROMPT)}", fill=MUTED)
    for x, fill, name in KEY:
        drawing.rectangle(x, 70, 14, 14, fill=fill, stroke=LINE)
        drawing.text(x + 20, 82, name)
    for number, step in enumerate(steps):
        _step(drawing, TOP + STEP * number, number, step)
    made = sum(step.kept for step in steps)
    drawing.text(20, TOP + STEP * len(steps) + 14, f"{made} words in {len(steps)} steps.", bold=True)
    return drawing.svg()


def _step(drawing: Drawing, y: float, number: int, step: Checked) -> None:
    drawing.badge(34, y + BOX + 4, str(number + 1))
    drawing.text(58, y + 18, "fed")
    drawing.text(58, y + BOX + 28, "drawn")
    for place, (word, drawn) in enumerate(zip(step.fed, step.drawn, strict=True)):
        x = LEFT + place * CELL
        if word is not None:
            drawing.rectangle(x, y, CELL - 18, BOX, fill=BLUE if place else GREY, radius=4, label=word, size=13)
            kept = place < step.kept  # after a wrong guess, what is drawn means nothing
            look = {"fill": GREEN if kept else PAPER, "label": drawn if kept else "·"}
            drawing.rectangle(x, y + BOX + 10, CELL - 18, BOX, stroke=LINE, radius=4, size=13, **look)
        if place and place < step.kept:  # the guess is what was drawn before it
            drawing.line(x - 18, y + BOX + 10 + BOX / 2, x, y + BOX / 2, stroke=INK)
