"""Draws line charts: curves over one horizontal axis, with their names at their ends or in the page's key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from distaccum.tools.pages.svg import axis_ticks, line, short, svg, text

_LABEL_GAP = 14.5
_LABEL_ROOM = 158.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One of a chart's two axes."""

    title: str
    is_log: bool = False
    """Equal factors are equal distances. Values of 0 and below are left out."""
    low: float | None = None
    """Where the axis begins. None: at the smallest value."""
    high: float | None = None
    """Where it ends. None: at the largest value."""
    ticks: Sequence[float] | None = None
    """None: round numbers."""
    tick: Callable[[float], str] = short
    """How a tick's number is written."""

    def place(self, value: float) -> float:
        """Returns where a value lies, up to shift and scale."""
        return math.log(value) if self.is_log else value

    def has(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.is_log)


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a line chart. Where a value is not finite, it has a gap."""

    style: str
    """CSS classes; the colour is theirs."""
    points: list[tuple[float, float]]
    hint: str
    """Shown when the pointer rests on it."""
    has_marks: bool = False
    is_dashed: bool = False
    has_line: bool = True
    tag: str = ""
    """Written beside its last point."""
    label: str = ""
    """Name of its values where the pointer shows them; empty: they are not shown."""
    name: str = ""
    """Written at its end, if the chart has room for names."""


@dataclass(frozen=True, slots=True)
class Band:
    """An area between two heights."""

    style: str
    points: list[tuple[float, float, float]]
    """Triples (x, lower y, upper y)."""
    hint: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A value on one of the axes that is marked by a line across the chart."""

    value: float
    label: str
    is_vertical: bool = True


class _Scale:
    """Maps the values of an axis to places from `start` to `end`."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        self.low, self.high = _ends(axis, values)

    def at(self, value: float) -> float:
        low, high = self.axis.place(self.low), self.axis.place(self.high)
        # What lies beyond an end that was set stays on the edge.
        share = min(1.0, max(0.0, (self.axis.place(value) - low) / ((high - low) or 1.0)))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Sequence[float]:
        return axis_ticks(self.low, self.high, 5, self.axis.is_log) if self.axis.ticks is None else self.axis.ticks

    def for_script(self) -> str:
        """Returns where values are, for the page's script."""
        numbers = (self.start, self.end, self.low, self.high, self.axis.is_log)
        return ",".join(f"{float(number):.8g}" for number in numbers)


class _Drawing:
    """The parts of a chart."""

    def __init__(self, x: _Scale, y: _Scale) -> None:
        self.x, self.y = x, y
        self.left, self.right, self.bottom, self.top = x.start, x.end, y.start, y.end
        self.parts: list[str] = []

    def draw_axes(self) -> None:
        self.parts.append(text(0, 14, self.y.axis.title, "panel-title"))
        for tick in self.y.ticks():
            y = self.y.at(tick)
            self.parts.append(line(self.left, y, self.right, y, "grid"))
            self.parts.append(text(self.left - 8, y + 4, self.y.axis.tick(tick), "tick", "end"))
        for tick in self.x.ticks():
            x = self.x.at(tick)
            self.parts.append(line(x, self.bottom, x, self.bottom + 4, "axis"))
            self.parts.append(text(x, self.bottom + 18, self.x.axis.tick(tick), "tick", "middle"))
        self.parts.append(line(self.left, self.bottom, self.right, self.bottom, "axis"))
        middle = (self.left + self.right) / 2
        self.parts.append(text(middle, self.bottom + 38, self.x.axis.title, "tick", "middle"))

    def draw_band(self, band: Band) -> None:
        upper = [(self.x.at(x), self.y.at(high)) for x, _, high in band.points]
        lower = [(self.x.at(x), self.y.at(low)) for x, low, _ in reversed(band.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*upper, *lower))
        self.parts.append(
            f'<g class="band {band.style}"><title>{escape(band.hint)}</title><polygon points="{path}"/></g>'
        )

    def draw_mark(self, mark: Mark) -> None:
        if mark.is_vertical:
            x = self.x.at(mark.value)
            is_right = x > (self.left + self.right) / 2
            self.parts.append(line(x, self.top - 4, x, self.bottom, "limit"))
            side, anchor = (x + 2, "end") if is_right else (x - 2, "start")
            self.parts.append(text(side, self.top - 7, mark.label, "tick", anchor))
        else:
            y = self.y.at(mark.value)
            self.parts.append(line(self.left, y, self.right, y, "limit"))
            self.parts.append(text(self.left + 4, y - 5, mark.label, "tick on-grid"))

    def draw_curve(self, curve: Curve) -> tuple[float, float] | None:
        """Draws a curve; returns where it ends."""
        pieces: list[list[tuple[float, float]]] = [[]]
        for x, y in curve.points:
            if self.x.axis.has(x) and self.y.axis.has(y):
                pieces[-1].append((self.x.at(x), self.y.at(y)))
            elif pieces[-1]:
                pieces.append([])
        pieces = [piece for piece in pieces if piece]
        dashes = ' stroke-dasharray="4 4"' if curve.is_dashed else ""
        body = ""
        for piece in pieces:
            if curve.has_line and len(piece) > 1:
                body += f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in piece)}"{dashes}/>'
            if curve.has_marks or (curve.has_line and len(piece) == 1):
                body += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in piece)
        if curve.tag and pieces:
            x, y = pieces[-1][-1]
            is_right = x > self.right - 50
            body += text(x - 8 if is_right else x + 8, y - 8, curve.tag, "tag", "end" if is_right else "start")
        label = f' data-name="{escape(curve.label)}"' if curve.label else ""
        self.parts.append(f'<g class="curve {curve.style}"{label}><title>{escape(curve.hint)}</title>{body}</g>')
        return pieces[-1][-1] if pieces else None


def _ends(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    usable = [value for value in values if axis.has(value)]
    low = min(usable, default=1.0 if axis.is_log else 0.0) if axis.low is None else axis.low
    high = max(usable, default=low) if axis.high is None else axis.high
    if high > low:
        return low, high
    return (low / 2, low * 2) if axis.is_log else (min(low, low - abs(low) / 2), low + (abs(low) / 2 or 1.0))


def line_chart(
    name: str,
    curves: Sequence[Curve],
    *,
    x: Axis,
    y: Axis,
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
    size: tuple[float, float] | None = None,
) -> Markup:
    """Draws a chart of lines.

    Args:
        name: what it shows in words, for readers who don't see it.
        size: width and height, for curves without names: the page's key has to say what colours mean. None: curves
            have their names at the right, moved apart where they would touch.
    """
    width, height = size or (530.0, 330.0)
    room = _LABEL_ROOM if size is None else 14.0
    points = [point for curve in curves for point in curve.points]
    points += [(at, value) for band in bands for at, *ends in band.points for value in ends]
    xs = [at for at, _ in points] + [mark.value for mark in marks if mark.is_vertical]
    ys = [value for _, value in points] + [mark.value for mark in marks if not mark.is_vertical]
    drawing = _Drawing(_Scale(x, xs, 52.0, width - room), _Scale(y, ys, height - 44.0, 34.0))
    drawing.draw_axes()
    for band in bands:
        drawing.draw_band(band)
    drawn = [(drawing.draw_curve(curve), curve) for curve in curves]
    ends = [(end, curve) for end, curve in drawn if end is not None and curve.name]
    for mark in marks:
        drawing.draw_mark(mark)
    if size is None:
        heights = spread_labels([end[1] for end, _ in ends], drawing.top - 6, drawing.bottom + 4)
        for (end, curve), height_of_name in zip(ends, heights, strict=True):
            at = drawing.right + 10
            drawing.parts.append(
                f'<g class="{curve.style}">{line(end[0] + 4, end[1], at - 2, height_of_name, "leader")}'
                f"{text(at + 2, height_of_name + 4, curve.name, 'curve-name', hint=curve.hint)}</g>"
            )
    attributes = {"data-x": drawing.x.for_script(), "data-y": drawing.y.for_script(), "data-at": x.title}
    return svg(width, height, name, drawing.parts, attributes)


def spread_labels(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Moves labels apart that would touch, as little as that takes, and keeps them inside.

    >>> spread_labels([10.0, 10.0, 50.0], 0.0, 100.0)
    [10.0, 24.5, 50.0]
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [0.0] * len(heights)
    last = top - _LABEL_GAP
    for index in order:
        last = placed[index] = max(heights[index], last + _LABEL_GAP)
    limit = bottom
    for index in reversed(order):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - _LABEL_GAP
    return placed
