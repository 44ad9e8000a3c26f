"""How a decode step's attention divides rows of different lengths into splits, and merges what they give."""

from typing import NamedTuple

from docs.pictures.svg import GREEN, GREY, INK, MUTED, ORANGE, PURPLE, Drawing
from fastllama.benchmarks.models import PUBLISHED_MODELS
from fastllama.kernels.attention.decode import MIN_SPLIT_KEYS
from fastllama.kernels.attention.online_softmax import MIN_DOT_ROWS, stream_launch
from fastllama.kernels.attention.scratch import NUM_SPLITS
from fastllama.kernels.launch.sizes import ceil_div

LENGTHS = (2048, 512, 4000, 100)  # positions of four rows
LEFT, WIDTH, TOP, HEIGHT = 142, 500, 104, 86
MERGE_LEFT = 690


class Split(NamedTuple):
    """The keys that one program attends to."""

    row: int
    begin: int
    end: int


def assign_splits(lengths: tuple[int, ...], tile: int) -> list[Split]:
    """The splits of rows of these lengths, in the order of their programs: the arithmetic of the kernel."""
    share = ceil_div(sum(lengths), NUM_SPLITS * tile) * tile
    splits = []
    for row, length in enumerate(lengths):
        count = ceil_div(length, max(share, MIN_SPLIT_KEYS))
        keys = ceil_div(length, count * tile) * tile
        splits += [Split(row, begin, min(begin + keys, length)) for begin in range(0, length, keys)]
    return splits


def draw() -> str:
    """The picture of four rows."""
    shape = PUBLISHED_MODELS["llama3-8b"]
    head_dim = shape["dim"] // shape["n_heads"]
    splits = assign_splits(LENGTHS, stream_launch(MIN_DOT_ROWS, 2 * head_dim, 2).keys)
    bottom = TOP + len(LENGTHS) * HEIGHT
    drawing = Drawing(bottom + 92, "Rows of different lengths, their splits, partial results and the merge")
    drawing.text(20, 30, "Split attention: a longer row gets more splits", size=17, bold=True)
    drawing.text(20, 52, f"{len(LENGTHS)} rows, one kv head; the number in a box is that of its program", fill=MUTED)
    drawing.text(20, 88, "row, length", bold=True)
    drawing.text(LEFT, 88, "cached keys and values, one box for each split", bold=True)
    drawing.text(MERGE_LEFT, 88, "result", bold=True)
    for row in range(len(LENGTHS)):
        _row(drawing, row, [(index, split) for index, split in enumerate(splits) if split.row == row])
    programs = NUM_SPLITS + len(LENGTHS)
    drawing.line(20, bottom, 840, bottom)
    grid = f"The grid is fixed: {NUM_SPLITS} + {len(LENGTHS)} rows = {programs} programs for each kv head."
    drawing.text(20, bottom + 26, f"{grid} {len(splits)} have a split; {programs - len(splits)} return at once.")
    drawing.rectangle(20, bottom + 50, 12, 12, fill=GREEN)
    drawing.text(38, bottom + 61, "partial result: maximum, sum of p, sum of p · v, in float32")
    drawing.rectangle(450, bottom + 50, 12, 12, fill=PURPLE)
    drawing.text(468, bottom + 61, "the last program of a row to finish adds them up")
    return drawing.svg()


def _row(drawing: Drawing, row: int, splits: list[tuple[int, Split]]) -> None:
    y, scale = TOP + row * HEIGHT, WIDTH / max(LENGTHS)
    drawing.text(20, y + 22, f"row {row}", bold=True)
    drawing.text(20, y + 40, f"{LENGTHS[row]:,} keys", fill=MUTED)
    several = len(splits) > 1
    end: float = LEFT
    if several:
        first = splits[0][1]
        drawing.arrow(LEFT + (first.end - first.begin) * scale / 2, y + 49, MERGE_LEFT - 2, y + 49)
        drawing.rectangle(MERGE_LEFT, y + 36, 150, 26, fill=PURPLE, label="merge, in split order")
        label = f"{len(splits)} splits of {first.end - first.begin} keys"
        shorter = splits[-1][1].end - splits[-1][1].begin
        label += f", the last of {shorter}" if shorter < first.end - first.begin else ""
        drawing.text(LEFT, y + 72, label, size=12)
    for index, split in splits:
        x, width = LEFT + split.begin * scale, (split.end - split.begin) * scale - 2
        end = x + width
        drawing.rectangle(x, y + 8, width, 26, fill=ORANGE, label=f"{index}" if width >= 14 else "")
        if width < 14:
            drawing.text(x + width + 6, y + 26, f"{index}", size=12)
        if several:
            drawing.line(x + width / 2, y + 34, x + width / 2, y + 44, stroke=INK)
            drawing.rectangle(x + width / 2 - 5, y + 44, 10, 10, fill=GREEN)
    if not several:
        drawing.text(LEFT, y + 58, "1 split: nothing to merge", size=12)
        drawing.arrow(end + 26, y + 21, MERGE_LEFT - 4, y + 21)
        drawing.rectangle(MERGE_LEFT, y + 8, 150, 26, fill=GREY, label="stored directly")
    if row + 1 < len(LENGTHS):
        drawing.line(20, y + HEIGHT - 6, 840, y + HEIGHT - 6, stroke=GREY)
