"""Two launches on a time line: an ordinary launch, and one that is dependent on the kernel before."""

from typing import NamedTuple

from docs.pictures.svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PALE,
    PURPLE,
    VERMILION,
    Drawing,
)

LEFT, TRACK, HEIGHT = 122, 40, 28
TRIGGER, WAIT_ENDS, DEPENDENT_END, ORDINARY_END = 60, 300, 470, 714


class Span(NamedTuple):
    """A part of a track."""

    begin: float
    end: float
    fill: str
    label: str


# By tracks, in pixels from LEFT. A sketch: no length is a measured time.
KERNEL_A = (Span(0, 190, BLUE, "load"), Span(190, WAIT_ENDS, PURPLE, "compute, store"))
ORDINARY = {
    "kernel A": KERNEL_A,
    "kernel B": (
        Span(WAIT_ENDS, 394, GREY, "launch gap"),
        Span(394, 604, BLUE, "load weights and x"),
        Span(604, ORDINARY_END, PURPLE, "compute, store"),
    ),
    "memory": (Span(0, 190, ORANGE, "busy"), Span(190, 394, PALE, "idle"), Span(394, 604, ORANGE, "busy")),
}
DEPENDENT = {
    "kernel A": KERNEL_A,
    "kernel B": (
        Span(190, WAIT_ENDS, BLUE, "load weights"),
        Span(WAIT_ENDS, 360, GREEN, "load x"),
        Span(360, DEPENDENT_END, PURPLE, "compute, store"),
    ),
    "L2 prefetch": (Span(190, 400, BLUE, "weights of B's later programs"),),
    "memory": (Span(0, 400, ORANGE, "busy"),),
}


def draw() -> str:
    """The picture."""
    drawing = Drawing(520, "Two kernels on a time line, with an ordinary launch and with a dependent launch")
    drawing.text(20, 30, "A dependent launch uses the time between two kernels", size=17, bold=True)
    drawing.text(20, 52, "A sketch: not to scale, not measured. Time runs to the right.", fill=MUTED)
    drawing.text(20, 86, "Ordinary launch: B starts after A has ended", bold=True)
    _tracks(drawing, 98, ORDINARY)
    drawing.line(20, 230, 840, 230)
    drawing.text(20, 256, "Dependent launch: B's programs start when a multiprocessor has space for them", bold=True)
    top = 302
    _tracks(drawing, top, DEPENDENT)
    _marks(drawing, top)
    drawing.text(
        20, 488, "Before the wait, B only loads weights and prefetches. After it, B reads what A wrote, and writes."
    )
    drawing.text(20, 508, "Every kernel waits once, so at the wait everything earlier in the stream is complete.")
    return drawing.svg()


def _tracks(drawing: Drawing, top: float, tracks: dict[str, tuple[Span, ...]]) -> None:
    for index, (name, spans) in enumerate(tracks.items()):
        y = top + index * TRACK
        drawing.text(LEFT - 12, y + 19, name, anchor="end")
        for span in spans:
            stroke = LINE if span.fill == PALE else None
            width = span.end - span.begin - 2
            drawing.rectangle(LEFT + span.begin, y, width, HEIGHT, fill=span.fill, stroke=stroke, label=span.label)


def _marks(drawing: Drawing, top: float) -> None:
    """The trigger in kernel A, the end of B's wait, and how much earlier B ends."""
    trigger, wait_ends = LEFT + TRIGGER, LEFT + WAIT_ENDS - 1
    drawing.text(trigger, top - 18, "A's trigger: B may start", anchor="middle")
    drawing.arrow(trigger, top - 13, trigger, top + 2, stroke=VERMILION)
    drawing.text(wait_ends + 6, top - 18, "B's wait ends: A is complete, its results are visible")
    drawing.line(wait_ends, top - 30, wait_ends, top + TRACK + HEIGHT + 4, stroke=VERMILION, width=2, dashed=True)
    y = top + TRACK + HEIGHT / 2
    drawing.line(LEFT + ORDINARY_END, y - 18, LEFT + ORDINARY_END, y + 18, stroke=INK)
    drawing.text(LEFT + (DEPENDENT_END + ORDINARY_END) / 2, y - 8, "B ends earlier", anchor="middle")
    drawing.arrow(LEFT + ORDINARY_END, y, LEFT + DEPENDENT_END + 2, y)
