"""A small plot in SVG whose axes are logarithmic, in the colours of the page around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from html import escape

WIDE, TALL = 300, 190
"""Of the plane; a phone is 360 wide."""
LEFT, TOP = 46, 20
COLOURS = ("#d55e00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#999999", "#666666", "#e69f00", "#888888")
"""Okabe and Ito's, readable on white and on black."""
STYLE = (
    "text{font:11px sans-serif;fill:currentColor;stroke:none}.end{text-anchor:end}.mid{text-anchor:middle}"
    ".line{fill:none;stroke-width:2}.grid{stroke:currentColor;stroke-width:.5;opacity:.3}"
)


class Plot:
    """Lines and dots over ticks that are given with their labels; names stand below, two in a row."""

    def __init__(
        self, title: str, x_ticks: Mapping[float, str], y_ticks: Mapping[float, str], x_label: str, y_label: str
    ) -> None:
        self.title = title
        self.x = _scale(x_ticks, LEFT, LEFT + WIDE)
        self.y = _scale(y_ticks, TOP + TALL, TOP)
        self.names: list[str] = []
        bottom, right = TOP + TALL, LEFT + WIDE
        self.parts = [
            f'<text x="{LEFT}" y="11">{escape(y_label)}</text><text x="{right}" y="{bottom + 30}" class="end">{escape(x_label)}</text>',
            *(f'<path class="grid" d="M{LEFT} {self.y(at):.1f}H{right}"/><text x="{LEFT - 4}" y="{self.y(at) + 4:.1f}" class="end">{tick}</text>'
              for at, tick in y_ticks.items()),
            *(f'<text x="{self.x(at):.1f}" y="{bottom + 15}" class="mid">{tick}</text>' for at, tick in x_ticks.items()),
        ]  # fmt: skip

    def line(self, points: Iterable[tuple[float, float]], name: str, dash: str = "") -> None:
        """A line through points, under the next colour."""
        style = f'class="line" stroke="{COLOURS[len(self.names)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")
        self.parts.append(f'<path {style} d="M{"L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)}"/>')
        self._name(name, lambda x, y: f'<path {style} d="M{x} {y - 4}h16"/>')

    def dots(self, points: Mapping[str, tuple[float, float]], name: str, hollow: bool = False) -> None:
        """A dot for each point, which says its own name."""
        colour = COLOURS[len(self.names)]
        style = f'r="3" stroke="{colour}" fill="{"none" if hollow else colour}"'
        for own, (x, y) in points.items():
            self.parts.append(
                f'<circle {style} cx="{self.x(x):.1f}" cy="{self.y(y):.1f}"><title>{escape(own)}</title></circle>'
            )
        self._name(name, lambda x, y: f'<circle {style} cx="{x + 8}" cy="{y - 4}"/>')

    def _name(self, name: str, sign: Callable[[int, int], str]) -> None:
        row, column = divmod(len(self.names), 2)
        x, y = 12 + 172 * column, TOP + TALL + 48 + 15 * row
        self.names.append(name)
        self.parts.append(f'{sign(x, y)}<text x="{x + 20}" y="{y}">{escape(name)}</text>')

    def svg(self) -> str:
        """The plot, on one line."""
        height = TOP + TALL + 58 + 15 * ((len(self.names) - 1) // 2)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 {height}" role="img"><title>{escape(self.title)}</title>'
        return f"{head}<style>{STYLE}</style>{''.join(self.parts)}</svg>"


def powers(least: float, most: float) -> dict[float, str]:
    """Ticks at powers of ten around some values."""
    return {
        10.0**n: str(10**n) if 0 <= n < 4 else f"1e{n}"
        for n in range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    }


def _scale(ticks: Iterable[float], begin: int, end: int) -> Callable[[float], float]:
    low, high = math.log(min(ticks)), math.log(max(ticks))
    return lambda value: begin + (end - begin) * (math.log(value) - low) / (high - low)
