"""Draws line charts: curves over one horizontal axis, with their names at their ends or in the page's key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


@dataclass(kw_only=True, slots=True)
class _Frame:
    """Maps values to places in the chart."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float
    low_x: float
    high_x: float
    low_y: float
    high_y: float
    parts: list[str] = field(default_factory=list)

    def at_x(self, value: float) -> float:
        low, high = self.x.place(self.low_x), self.x.place(self.high_x)
        return self.left + (self.x.place(value) - low) / ((high - low) or 1.0) * (self.right - self.left)

    def at_y(self, value: float) -> float:
        low, high = self.y.place(self.low_y), self.y.place(self.high_y)
        # What lies beyond an end that was set stays on the edge.
        share = min(1.0, max(0.0, (self.y.place(value) - low) / ((high - low) or 1.0)))
        return self.bottom - share * (self.bottom - self.top)

    def attributes(self) -> dict[str, str]:
        """Returns where values are, for the page's script."""
        sides = {
            "data-x": (self.left, self.right, self.low_x, self.high_x, self.x.is_log),
            "data-y": (self.bottom, self.top, self.low_y, self.high_y, self.y.is_log),
        }
        numbers = {name: ",".join(f"{float(value):.8g}" for value in values) for name, values in sides.items()}
        return {**numbers, "data-at": self.x.title}

    def draw_axes(self) -> None:
        x_ticks = axis_ticks(self.low_x, self.high_x, 5, self.x.is_log) if self.x.ticks is None else self.x.ticks
        y_ticks = axis_ticks(self.low_y, self.high_y, 5, self.y.is_log) if self.y.ticks is None else self.y.ticks
        self.parts.append(text(0, 14, self.y.title, "panel-title"))
        for tick in y_ticks:
            y = self.at_y(tick)
            self.parts.append(line(self.left, y, self.right, y, "grid"))
            self.parts.append(text(self.left - 8, y + 4, self.y.tick(tick), "tick", "end"))
        for tick in x_ticks:
            x = self.at_x(tick)
            self.parts.append(line(x, self.bottom, x, self.bottom + 4, "axis"))
            self.parts.append(text(x, self.bottom + 18, self.x.tick(tick), "tick", "middle"))
        self.parts.append(line(self.left, self.bottom, self.right, self.bottom, "axis"))
        middle = (self.left + self.right) / 2
        self.parts.append(text(middle, self.bottom + 38, self.x.title, "tick", "middle"))

    def draw_band(self, band: Band) -> None:
        upper = [(self.at_x(x), self.at_y(high)) for x, _, high in band.points]
        lower = [(self.at_x(x), self.at_y(low)) for x, low, _ in reversed(band.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*upper, *lower))
        self.parts.append(
            f'<g class="band {band.style}"><title>{escape(band.hint)}</title><polygon points="{path}"/></g>'
        )

    def draw_mark(self, mark: Mark) -> None:
        if mark.is_vertical:
            x = self.at_x(mark.value)
            is_right = x > (self.left + self.right) / 2
            self.parts.append(line(x, self.top - 4, x, self.bottom, "limit"))
            side, anchor = (x + 2, "end") if is_right else (x - 2, "start")
            self.parts.append(text(side, self.top - 7, mark.label, "tick", anchor))
        else:
            y = self.at_y(mark.value)
            self.parts.append(line(self.left, y, self.right, y, "limit"))
            self.parts.append(text(self.left + 4, y - 5, mark.label, "tick on-grid"))

    def draw_curve(self, curve: Curve) -> tuple[float, float] | None:
        """Draws a curve; returns where it ends."""
        pieces: list[list[tuple[float, float]]] = [[]]
        for x, y in curve.points:
            if self.x.has(x) and self.y.has(y):
                pieces[-1].append((self.at_x(x), self.at_y(y)))
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
    low_x, high_x = _ends(x, [at for at, _ in points] + [mark.value for mark in marks if mark.is_vertical])
    low_y, high_y = _ends(y, [value for _, value in points] + [mark.value for mark in marks if not mark.is_vertical])
    frame = _Frame(
        x=x, y=y, left=52.0, right=width - room, top=34.0, bottom=height - 44.0,
        low_x=low_x, high_x=high_x, low_y=low_y, high_y=high_y,
    )  # fmt: skip
    frame.draw_axes()
    for band in bands:
        frame.draw_band(band)
    drawn = [(frame.draw_curve(curve), curve) for curve in curves]
    ends = [(end, curve) for end, curve in drawn if end is not None and curve.name]
    for mark in marks:
        frame.draw_mark(mark)
    if size is None:
        heights = spread_labels([end[1] for end, _ in ends], frame.top - 6, frame.bottom + 4)
        for (end, curve), height_of_name in zip(ends, heights, strict=True):
            at = frame.right + 10
            frame.parts.append(
                f'<g class="{curve.style}">{line(end[0] + 4, end[1], at - 2, height_of_name, "leader")}'
                f"{text(at + 2, height_of_name + 4, curve.name, 'curve-name', hint=curve.hint)}</g>"
            )
    return svg(width, height, name, frame.parts, frame.attributes())


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
