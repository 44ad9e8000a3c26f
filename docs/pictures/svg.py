"""A drawing: rectangles, lines and texts, written as SVG. The same calls make the same bytes.

The paper is white, so that a picture looks the same in GitHub's light and dark mode. Colours are those of Okabe and
Ito, "Color Universal Design", 2008, which colour-blind readers can tell apart.
"""

from typing import Literal
from xml.sax.saxutils import escape, quoteattr

WIDTH = 860
PAPER, INK, MUTED, LINE, PALE = "#ffffff", "#1f2328", "#57606a", "#8c959f", "#f6f8fa"
BLUE, ORANGE, GREEN, PURPLE, VERMILION, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#d0d7de"
ON_DARK = {BLUE, GREEN, VERMILION}  # colours on which text is white
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"


class Drawing:
    """One picture. Coordinates are pixels from the top left corner, texts at least 12 pixels high."""

    def __init__(self, height: float, title: str) -> None:
        self._title, self._height = title, height
        self._parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        bold: bool = False,
        fill: str = INK,
        anchor: Literal["start", "middle", "end"] = "start",
    ) -> None:
        """A line of text. y: its base line."""
        weight = ' font-weight="bold"' if bold else ""
        where = f'x="{_number(x)}" y="{_number(y)}" font-size="{_number(size)}" text-anchor="{anchor}"'
        self._parts.append(f'<text {where}{weight} fill="{fill}">{escape(text)}</text>')

    def rectangle(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = PAPER,
        stroke: str | None = None,
        radius: float = 0,
        label: str = "",
        size: float = 12,
    ) -> None:
        """A rectangle, its label in the middle."""
        line = f' stroke="{stroke}"' if stroke else ""
        where = f'x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'
        self._parts.append(f'<rect {where} rx="{_number(radius)}" fill="{fill}"{line}/>')
        if label:
            ink = PAPER if fill in ON_DARK else INK
            self.text(x + width / 2, y + height / 2 + size * 0.36, label, size=size, fill=ink, anchor="middle")

    def line(
        self,
        x: float,
        y: float,
        to_x: float,
        to_y: float,
        *,
        stroke: str = LINE,
        width: float = 1,
        dashed: bool = False,
    ) -> None:
        """A straight line."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        where = f'x1="{_number(x)}" y1="{_number(y)}" x2="{_number(to_x)}" y2="{_number(to_y)}"'
        self._parts.append(f'<line {where} stroke="{stroke}" stroke-width="{_number(width)}"{dashes}/>')

    def polygon(self, *points: tuple[float, float], fill: str = INK, opacity: float = 1) -> None:
        """A filled polygon."""
        corners = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        faint = f' fill-opacity="{_number(opacity)}"' if opacity < 1 else ""
        self._parts.append(f'<polygon points="{corners}" fill="{fill}"{faint}/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, *, stroke: str = INK) -> None:
        """A straight arrow, level or upright."""
        self.line(x, y, to_x, to_y, stroke=stroke, width=1.5)
        along_x, along_y = _sign(to_x - x), _sign(to_y - y)
        back_x, back_y = to_x - 8 * along_x, to_y - 8 * along_y
        side_x, side_y = 4 * along_y, 4 * along_x
        self.polygon((to_x, to_y), (back_x + side_x, back_y + side_y), (back_x - side_x, back_y - side_y), fill=stroke)

    def badge(self, x: float, y: float, text: str) -> None:
        """A number in a disc."""
        self._parts.append(f'<circle cx="{_number(x)}" cy="{_number(y)}" r="11" fill="{INK}"/>')
        self.text(x, y + 4.5, text, bold=True, fill=PAPER, anchor="middle")

    def svg(self) -> str:
        """The file's text."""
        size = f'width="{WIDTH}" height="{_number(self._height)}" viewBox="0 0 {WIDTH} {_number(self._height)}"'
        name = f'role="img" aria-label={quoteattr(self._title)}'
        paper = f'<rect width="{WIDTH}" height="{_number(self._height)}" rx="6" fill="{PAPER}"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {name} font-family="{FONT}">'
        return "\n".join([head, f"<title>{escape(self._title)}</title>", paper, *self._parts, "</svg>", ""])


def _number(value: float) -> str:
    return f"{round(value, 2):g}"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
