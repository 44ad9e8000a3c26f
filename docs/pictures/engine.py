"""A request's way through the engine, and a few steps of five requests on three rows, by the engine's own scheduler."""

from typing import NamedTuple

from docs.pictures.svg import BLUE, GREEN, GREY, INK, LINE, MUTED, ORANGE, PALE, PURPLE, VERMILION, Drawing
from fastllama.engine.sampling_params import SamplingParams
from fastllama.engine.scheduler import Scheduler
from fastllama.engine.sequence import Sequence
from fastllama.kernels.paged_cache import PAGE_TOKENS
from fastllama.page_pool import PagePool
from fastllama.tokenizer_base import TextStream

ROWS, PAGES, STEP_TOKENS = 3, 12, 128
STATIONS = (
    ("submit", "prompt, settings"),
    ("wait", "row, pages"),
    ("prefill", "prompt, in chunks"),
    ("decode", "one token a step"),
    ("text", "stop strings"),
    ("end", "row is free again"),
)
LEFT, TOP, CELL, ROW_HEIGHT = 84, 196, 36, 40


class Wanted(NamedTuple):
    """A request of the picture."""

    name: str
    fill: str
    prompt: int  # tokens
    answer: int
    arrives: int  # at this step
    begin: int = 0  # requests with the same number begin with the same tokens


REQUESTS = (
    Wanted("A", BLUE, prompt=200, answer=14, arrives=0, begin=1),
    Wanted("B", ORANGE, prompt=30, answer=5, arrives=0, begin=2),
    Wanted("C", GREEN, prompt=90, answer=8, arrives=0, begin=3),
    Wanted("D", PURPLE, prompt=190, answer=7, arrives=1, begin=1),
    Wanted("E", VERMILION, prompt=50, answer=6, arrives=3, begin=4),
)


class Cell(NamedTuple):
    """What a row does in a step."""

    wanted: Wanted
    computed: int  # tokens of the prompt
    decodes: bool  # whether it gets a token of its answer
    cached: int  # tokens that were found in the cache, in the request's first step


def simulated() -> list[list[Cell | None]]:
    """What every row does in every step, by the scheduler."""
    scheduler = Scheduler(PagePool(PAGES), ROWS)
    names: dict[Sequence, Wanted] = {}
    steps: list[list[Cell | None]] = []
    while len(steps) == 0 or names:
        for arrival, one in enumerate(REQUESTS):
            if one.arrives == len(steps):
                names[sequence := _sequence(arrival, one)] = one
                scheduler.add(sequence)
        started = scheduler.admit()
        cells: list[Cell | None] = [None] * ROWS
        for chunk in scheduler.next_chunks(STEP_TOKENS):
            cached = chunk.sequence.n_cached if chunk.sequence in started else 0
            decodes = chunk.sequence.is_prefilled
            cells[chunk.sequence.placed_row] = Cell(names[chunk.sequence], chunk.end - chunk.begin, decodes, cached)
            scheduler.remember(chunk.sequence)
        scheduler.grow()
        for sequence in list(scheduler.running):
            if sequence.is_prefilled:
                sequence.is_decoding = True
                row = sequence.placed_row
                cells[row] = cells[row] or Cell(names[sequence], 0, decodes=True, cached=0)
                sequence.n_computed = len(sequence.tokens)
                sequence.tokens.append(0)
                if len(sequence.tokens) - 1 == sequence.last:
                    scheduler.remove(sequence)
                    del names[sequence]
        steps.append(cells)
    return steps


def _sequence(arrival: int, wanted: Wanted) -> Sequence:
    tokens = [wanted.begin] * wanted.prompt
    last = wanted.prompt - 1 + wanted.answer
    text: TextStream = TextStream.__new__(TextStream)  # the scheduler reads no text
    params = SamplingParams(max_gen_len=wanted.answer)
    return Sequence(arrival, 0, params, tokens, wanted.prompt, last, (0, 0, 0), frozenset(), text)


def draw() -> str:
    """The picture."""
    steps = simulated()
    bottom = TOP + ROWS * ROW_HEIGHT
    drawing = Drawing(
        bottom + 104, "A request's way through the engine, and a few steps of five requests on three rows"
    )
    drawing.text(20, 30, "A request's way", size=17, bold=True)
    width = 122
    for index, (name, what) in enumerate(STATIONS):
        x = 20 + index * (width + 17)
        drawing.rectangle(x, 44, width, 56, fill=PALE, stroke=LINE, radius=6)
        drawing.text(x + width / 2, 67, name, size=14, bold=True, anchor="middle")
        drawing.text(x + width / 2, 88, what, fill=MUTED, anchor="middle")
        if index + 1 < len(STATIONS):
            drawing.arrow(x + width, 72, x + width + 17, 72)
    drawing.text(20, 138, f"Five requests on {ROWS} rows, step by step", size=15, bold=True)
    drawing.text(20, 158, f"at most {STEP_TOKENS} tokens of prompts a step", fill=MUTED)
    for index in range(len(steps)):
        drawing.text(LEFT + (index + 0.5) * CELL, TOP - 10, str(index + 1), size=12, fill=MUTED, anchor="middle")
    for row in range(ROWS):
        y = TOP + row * ROW_HEIGHT
        drawing.text(20, y + 24, f"row {row}")
        for index, cells in enumerate(steps):
            _cell(drawing, LEFT + index * CELL, y, cells[row])
    _legend(drawing, bottom, steps)
    return drawing.svg()


def _cell(drawing: Drawing, x: float, y: float, cell: Cell | None) -> None:
    if cell is None:
        drawing.rectangle(x + 1, y + 2, CELL - 2, ROW_HEIGHT - 6, fill=PALE)
    elif cell.computed == 0:
        drawing.rectangle(
            x + 1, y + 2, CELL - 2, ROW_HEIGHT - 6, fill=cell.wanted.fill, label=cell.wanted.name, size=14
        )
    else:
        drawing.rectangle(x + 1, y + 2, CELL - 2, ROW_HEIGHT - 6, fill=GREY, stroke=cell.wanted.fill)
        drawing.text(x + CELL / 2, y + 16, cell.wanted.name, size=12, bold=True, anchor="middle")
        drawing.text(x + CELL / 2, y + 29, str(cell.computed), size=12, fill=INK, anchor="middle")
        if cell.decodes:
            drawing.rectangle(x + 1, y + ROW_HEIGHT - 8, CELL - 2, 4, fill=cell.wanted.fill)


def _legend(drawing: Drawing, bottom: float, steps: list[list[Cell | None]]) -> None:
    y = bottom + 22
    drawing.rectangle(20, y - 11, 14, 14, fill=GREY, stroke=BLUE)
    drawing.text(40, y, "so many tokens of a prompt are computed")
    drawing.rectangle(380, y - 11, 14, 14, fill=BLUE)
    drawing.text(400, y, "a token of the answer, in the decode step of all rows")
    cached = [cell for cells in steps for cell in cells if cell is not None and cell.cached]
    for place, cell in enumerate(cached):
        drawing.text(
            20,
            y + 28 + 20 * place,
            f"{cell.wanted.name} begins like A: {cell.cached} of its {cell.wanted.prompt} tokens, "
            f"{cell.cached // PAGE_TOKENS} pages of {PAGE_TOKENS}, are in the cache and not computed again.",
        )
    y += 28 + 20 * len(cached)
    drawing.text(20, y, "A step has at most one chunk of prompts, and one token of every row: no answer waits long.")
    drawing.text(20, y + 20, "A row is free for the next request in the step after its answer ends.")
