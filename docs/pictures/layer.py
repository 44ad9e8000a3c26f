"""A decode layer's five launches: what each fuses, and the bytes that it must read from memory."""

import torch

from docs.pictures.svg import BLUE, INK, LINE, MUTED, ORANGE, PALE, Drawing
from fastllama.args import ModelArgs
from fastllama.benchmarks.models import PUBLISHED_MODELS
from fastllama.speed_of_light import Work, decode_step, total_bytes

CONTEXT = 2048
# By the names of `decode_step`, in order: the op, and what it fuses.
LAUNCHES = {
    "qkv": ("norm_qkv_rope_append", "RMSNorm → q, k, v → rotary → append"),
    "attention": ("attention", "scores → softmax → values → merge of splits"),
    "output": ("linear_residual", "attention's projection → + residual"),
    "gate+up": ("norm_swiglu", "RMSNorm → gate, up → SiLU(gate) · up"),
    "down": ("linear_residual", "down projection → + residual"),
}
BOX, GAP, TOP = 60, 18, 92
BAR_LEFT, BAR_WIDTH = 392, 320


def draw() -> str:
    """The picture of Llama 3 8B in bfloat16, one row."""
    step = decode_step(args := ModelArgs(**PUBLISHED_MODELS["llama3-8b"]), torch.bfloat16, 1, CONTEXT)
    works = {work.name: work for work in step}
    layer = [works[name] for name in LAUNCHES]
    drawing = Drawing(
        TOP + len(layer) * (BOX + GAP) + 76, "The five launches of a decode layer and the bytes they read"
    )
    drawing.text(20, 30, "A decode layer is five launches", size=17, bold=True)
    drawing.text(20, 52, f"Llama 3 8B, bfloat16, one row at a context of {CONTEXT:,} tokens", fill=MUTED)
    drawing.text(20, 77, "what a launch fuses", bold=True)
    drawing.text(BAR_LEFT, 77, "bytes it must read:", bold=True)
    for x, fill, name in ((BAR_LEFT + 150, BLUE, "weights"), (BAR_LEFT + 238, ORANGE, "cached keys and values")):
        drawing.rectangle(x, 66, 12, 12, fill=fill)
        drawing.text(x + 18, 77, name)
    most, layer_bytes = max(work.bytes for work in layer), sum(work.bytes for work in layer)
    for index, work in enumerate(layer):
        _launch(drawing, index, work, most, layer_bytes)
    bottom = TOP + len(layer) * (BOX + GAP)
    drawing.line(20, bottom, 840, bottom)
    head = works["head"].bytes
    drawing.text(20, bottom + 26, f"One layer: {_megabytes(layer_bytes)}.", bold=True)
    drawing.text(
        20,
        bottom + 48,
        f"A step: {args.n_layers} layers, the head ({_megabytes(head)}) and a row of the embedding: "
        f"{total_bytes(step) / 1e9:.2f} GB in {sum(work.count for work in step)} launches.",
    )
    return drawing.svg()


def _launch(drawing: Drawing, index: int, work: Work, most: float, layer_bytes: float) -> None:
    op, fused = LAUNCHES[work.name]
    y = TOP + index * (BOX + GAP)
    drawing.rectangle(20, y, 820, BOX, fill=PALE, stroke=LINE, radius=6)
    drawing.badge(42, y + BOX / 2, str(index + 1))
    drawing.text(64, y + 25, op, size=14, bold=True)
    drawing.text(64, y + 46, fused)
    width = BAR_WIDTH * work.bytes / most
    drawing.rectangle(BAR_LEFT, y + 18, width, 24, fill=ORANGE if work.name == "attention" else BLUE)
    drawing.text(BAR_LEFT + width + 8, y + 35, f"{_megabytes(work.bytes)}, {work.bytes / layer_bytes:.0%}")
    if index + 1 < len(LAUNCHES):
        drawing.arrow(42, y + BOX, 42, y + BOX + GAP, stroke=INK)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
