"""Draws rows of bars or dots that share their labels on the left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from distaccum.tools.pages.svg import bytes_tick, line, nice_ticks, shortened, svg, text

ROW_HEIGHT = 27
_BAR_HEIGHT = 13


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar."""

    value: float
    style: str
    """CSS class."""
    hint: str
    """Shown when the pointer rests on it."""


@dataclass(frozen=True, slots=True)
class Dot:
    """A value on a logarithmic axis."""

    value: float
    style: str
    hint: str
    radius: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One row's part of a panel."""

    bar: Sequence[Segment] = ()
    whisker: tuple[float, float] | None = None
    label: str = ""
    """Written behind the bar."""
    dots: Sequence[Dot] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One measure of all rows. Bars start at zero, dots lie on a logarithmic axis."""

    title: str
    share: float
    """Part of the chart's width."""
    label_width: float
    """Room for the labels behind the longest bar."""
    cells: Sequence[Cell]
    is_log: bool = False
    is_bytes: bool = False
    """Ticks at powers of two."""
    limit: tuple[float, str] | None = None
    """A value to be marked by a line, and its name."""


def row_chart(
    name: str, labels: Sequence[tuple[str, str]], reasons: Sequence[str | None], panels: Sequence[Panel]
) -> Markup:
    """Draws panels side by side, whose rows share the labels on the left.

    Args:
        labels: the name of each row and an addition in a quieter colour.
        reasons: why there is nothing to show in a row, or None.

    Returns:
        The chart in a box of class `wide`.
    """
    width, gutter, gap, top = 1080.0, 236.0, 26.0, 40.0
    height = top + ROW_HEIGHT * len(labels) + 30
    parts, notes = [], []
    for index, ((label, addition), reason) in enumerate(zip(labels, reasons, strict=True)):
        y = top + ROW_HEIGHT * (index + 0.5)
        style = "label" if reason is None else "label quiet"
        quiet = f'<tspan class="quiet">{escape(" " + addition)}</tspan>' if addition else ""
        where = f'x="{gutter - 12:.1f}" y="{y + 4:.1f}" text-anchor="end"'
        parts.append(f'<text {where} class="{style}">{escape(label)}{quiet}</text>')
    left = gutter
    for number, panel in enumerate(panels):
        room = (width - gutter) * panel.share - (gap if number < len(panels) - 1 else 0)
        parts += _panel(panel, left, room, top)
        if number == 0:
            # Over the grid, and over the panel beside it, where these rows have nothing to show.
            for index, reason in enumerate(reasons):
                if reason is not None:
                    y = top + ROW_HEIGHT * (index + 0.5) + 4
                    notes.append(text(left + 6, y, shortened(reason, 118), "reason", hint=reason))
        left += room + gap
    # On a narrow screen it is scrolled rather than shrunk.
    return Markup(f'<div class="wide">{svg(width, height, name, [*parts, *notes])}</div>')


def _panel(panel: Panel, left: float, room: float, top: float) -> list[str]:
    bottom = top + ROW_HEIGHT * len(panel.cells)
    parts = [text(left, 16, panel.title, "panel-title")]
    place, ticks = (_log_scale if panel.is_log else _linear_scale)(panel, left, room)
    name = bytes_tick if panel.is_bytes else _power if panel.is_log else "{:g}".format
    for tick in ticks:
        x = place(tick)
        parts.append(line(x, top - 4, x, bottom, "grid" if tick else "axis"))
        parts.append(text(x, bottom + 17, name(tick), "tick", "middle"))
    if panel.limit is not None:
        x = place(panel.limit[0])
        parts += [line(x, top - 6, x, bottom, "limit"), text(x + 4, top - 8, panel.limit[1], "tick")]
    for index, cell in enumerate(panel.cells):
        y = top + ROW_HEIGHT * (index + 0.5)
        parts += _bar(cell, y, place)
        parts += [
            f'<circle cx="{place(dot.value):.1f}" cy="{y:.1f}" r="{dot.radius:g}" class="{dot.style}">'
            f"<title>{escape(dot.hint)}</title></circle>"
            for dot in cell.dots
        ]
    return parts


def _power(value: float) -> str:
    return "0" if value == 0 else f"1e{round(math.log10(value))}"


def _bar(cell: Cell, y: float, place: Callable[[float], float]) -> list[str]:
    parts = []
    start = 0.0
    for segment in cell.bar:
        x1, x2 = place(start), place(start + segment.value)
        start += segment.value
        parts.append(
            f'<rect x="{x1:.1f}" y="{y - _BAR_HEIGHT / 2:.1f}" width="{max(0.0, x2 - x1):.1f}" height="{_BAR_HEIGHT}" '
            f'class="{segment.style}"><title>{escape(segment.hint)}</title></rect>'
        )
    end = place(start)
    if cell.whisker is not None:
        low, high = place(cell.whisker[0]), place(cell.whisker[1])
        parts += [line(low, y, high, y, "whisker")]
        parts += [line(x, y - 3.5, x, y + 3.5, "whisker") for x in (low, high)]
        end = max(end, high)
    if cell.label:
        parts.append(text(end + 7, y + 4, cell.label, "value"))
    return parts


def _linear_scale(panel: Panel, left: float, room: float) -> tuple[Callable[[float], float], list[float]]:
    ends = [sum(segment.value for segment in cell.bar) for cell in panel.cells]
    ends += [cell.whisker[1] for cell in panel.cells if cell.whisker is not None]
    largest = max(ends) or 1.0
    length = room - panel.label_width
    ticks = nice_ticks(largest, max(2, int(length / 62)), panel.is_bytes)
    return lambda value: left + value / largest * length, ticks


def _log_scale(panel: Panel, left: float, room: float) -> tuple[Callable[[float], float], list[float]]:
    values = [dot.value for cell in panel.cells for dot in cell.dots if dot.value > 0]
    if panel.limit is not None:
        values.append(panel.limit[0])
    low = math.floor(math.log10(min(values, default=1e-16)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))
    inset = 18.0  # zero has a place of its own at the left, where no logarithm reaches
    length = room - panel.label_width - 2 * inset

    def place(value: float) -> float:
        if value <= 0:
            return left
        return left + 2 * inset + (math.log10(value) - low) / (high - low) * (length - inset)

    step = max(1, math.ceil((high - low) / max(2, int(length / 58))))
    return place, [0.0, *(10.0**exponent for exponent in range(low, high + 1, step))]
