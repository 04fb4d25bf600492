"""Charts as SVG, made by hand: rows of bars or dots that share their labels, and lines with their names at the end.

Colours are classes, so that the page's style sheet decides on them, for light and for dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

ROW_HEIGHT = 27
_BAR_HEIGHT = 13
_LABEL_GAP = 14.5


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


@dataclass(kw_only=True, slots=True)
class Panel:
    """One measure of all rows. Bars start at zero; with `dots` the axis is logarithmic."""

    title: str
    share: float
    """Part of the chart's width."""
    tick: Callable[[float], str]
    label_width: float
    """Room for the labels behind the longest bar."""
    bars: list[list[Segment]] = field(default_factory=list)
    whiskers: list[tuple[float, float] | None] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    binary: bool = False
    """Ticks at powers of two, for bytes."""
    dots: list[list[Dot]] = field(default_factory=list)
    limit: tuple[float, str] | None = None
    """A value to be marked by a line, and its name."""


def escaped(text: str) -> str:
    return html.escape(text, quote=True)


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start", hint: str = "") -> str:
    title = f"<title>{escaped(hint)}</title>" if hint else ""
    css = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{title}{escaped(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def svg(width: float, height: float, name: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escaped(name)}">\n{body}\n</svg>'


def nice_ticks(largest: float, count: int = 5, binary: bool = False) -> list[float]:
    """Round numbers from 0 to about `largest`, at most `count` steps.

    >>> nice_ticks(37.0)
    [0.0, 10.0, 20.0, 30.0]
    """
    if largest <= 0 or not math.isfinite(largest):
        return [0.0]
    wanted = largest / count
    if binary:
        step = 2.0 ** math.ceil(math.log2(wanted))
    else:
        power = 10.0 ** math.floor(math.log10(wanted))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    return [index * step for index in range(int(largest / step * (1 + 1e-9)) + 1)]


def row_chart(
    name: str, labels: Sequence[tuple[str, str]], reasons: Sequence[str | None], panels: Sequence[Panel]
) -> str:
    """Panels side by side, whose rows share the labels on the left.

    Args:
        labels: the name of each row and what is added to it in a quieter voice.
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
        quiet = f'<tspan class="quiet">{escaped(" " + addition)}</tspan>' if addition else ""
        where = f'x="{gutter - 12:.1f}" y="{y + 4:.1f}" text-anchor="end"'
        parts.append(f'<text {where} class="{style}">{escaped(label)}{quiet}</text>')
    left = gutter
    for number, panel in enumerate(panels):
        room = (width - gutter) * panel.share - (gap if number < len(panels) - 1 else 0)
        parts += _panel(panel, left, room, top, len(labels))
        if number == 0:
            # Over the grid, and over the panel beside it, where these rows have nothing to show.
            for index, reason in enumerate(reasons):
                if reason is not None:
                    y = top + ROW_HEIGHT * (index + 0.5) + 4
                    notes.append(text(left + 6, y, _shortened(reason, 118), "reason", hint=reason))
        left += room + gap
    # On a narrow screen it is scrolled rather than shrunk.
    return f'<div class="wide">{svg(width, height, name, [*parts, *notes])}</div>'


def _panel(panel: Panel, left: float, room: float, top: float, num_rows: int) -> list[str]:
    bottom = top + ROW_HEIGHT * num_rows
    parts = [text(left, 16, panel.title, "panel-title")]
    scale = _log_scale(panel, left, room) if panel.dots else _linear_scale(panel, left, room)
    for tick, x in scale[1]:
        parts.append(line(x, top - 4, x, bottom, "grid" if tick else "axis"))
        parts.append(text(x, bottom + 17, panel.tick(tick), "tick", "middle"))
    place = scale[0]
    if panel.limit is not None:
        x = place(panel.limit[0])
        parts += [line(x, top - 6, x, bottom, "limit"), text(x + 4, top - 8, panel.limit[1], "tick")]
    for index, segments in enumerate(panel.bars):
        parts += _bar(panel, index, segments, top + ROW_HEIGHT * (index + 0.5), place)
    for index, dots in enumerate(panel.dots):
        y = top + ROW_HEIGHT * (index + 0.5)
        parts += [
            f'<circle cx="{place(dot.value):.1f}" cy="{y:.1f}" r="{dot.radius:g}" class="{dot.style}">'
            f"<title>{escaped(dot.hint)}</title></circle>"
            for dot in dots
        ]
    return parts


def _bar(panel: Panel, index: int, segments: Sequence[Segment], y: float, place: Callable[[float], float]) -> list[str]:
    parts = []
    start = 0.0
    for segment in segments:
        x1, x2 = place(start), place(start + segment.value)
        start += segment.value
        parts.append(
            f'<rect x="{x1:.1f}" y="{y - _BAR_HEIGHT / 2:.1f}" width="{max(0.0, x2 - x1):.1f}" height="{_BAR_HEIGHT}" '
            f'class="{segment.style}"><title>{escaped(segment.hint)}</title></rect>'
        )
    end = place(start)
    whisker = panel.whiskers[index] if panel.whiskers else None
    if whisker is not None:
        low, high = place(whisker[0]), place(whisker[1])
        parts += [line(low, y, high, y, "whisker")]
        parts += [line(x, y - 3.5, x, y + 3.5, "whisker") for x in (low, high)]
        end = max(end, high)
    if panel.labels and segments:
        parts.append(text(end + 7, y + 4, panel.labels[index], "value"))
    return parts


def _linear_scale(panel: Panel, left: float, room: float) -> tuple[Callable[[float], float], list[tuple[float, float]]]:
    ends = [sum(segment.value for segment in segments) for segments in panel.bars]
    ends += [whisker[1] for whisker in panel.whiskers if whisker is not None]
    largest = max(ends, default=0.0) or 1.0
    length = room - panel.label_width

    def place(value: float) -> float:
        return left + value / largest * length

    count = max(2, int(length / 62))
    return place, [(tick, place(tick)) for tick in nice_ticks(largest, count, panel.binary)]


def _log_scale(panel: Panel, left: float, room: float) -> tuple[Callable[[float], float], list[tuple[float, float]]]:
    values = [dot.value for dots in panel.dots for dot in dots if dot.value > 0]
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
    ticks = [(10.0**exponent, place(10.0**exponent)) for exponent in range(low, high + 1, step)]
    return place, [(0.0, left), *ticks]


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a line chart."""

    name: str
    style: str
    points: list[tuple[float, float]]
    hint: str
    has_marks: bool = False
    is_dashed: bool = False


def line_chart(
    name: str,
    curves: Sequence[Curve],
    *,
    x_title: str,
    y_title: str,
    x_ticks: Sequence[float],
    x_place: Callable[[float], float] = lambda value: value,
    from_zero: bool = True,
    y_tick: Callable[[float], str] = lambda value: f"{value:g}",
) -> str:
    """Lines with their names at the right, moved apart where they would touch.

    Args:
        x_place: where a value lies on the axis, up to shift and scale (`math.log2` for doublings).
    """
    width, height, left, right, top, bottom = 530.0, 330.0, 52.0, 158.0, 34.0, 44.0
    xs = [x_place(x) for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    low_x, high_x = min(xs), max(xs)
    low_y, high_y = (0.0 if from_zero else min(ys)), max(ys)
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x_place(x) - low_x) / span_x * (width - left - right),
            height - bottom - (y - low_y) / span_y * (height - top - bottom),
        )

    parts = [text(0, 14, y_title, "panel-title")]
    for tick in nice_ticks(high_y, 5):
        if tick < low_y:
            continue
        _, y = at(x_ticks[0], tick)
        parts.append(line(left, y, width - right, y, "grid"))
        parts.append(text(left - 8, y + 4, y_tick(tick), "tick", "end"))
    for tick in x_ticks:
        x, _ = at(tick, low_y)
        parts.append(line(x, height - bottom, x, height - bottom + 4, "axis"))
        parts.append(text(x, height - bottom + 18, f"{tick:g}", "tick", "middle"))
    parts.append(line(left, height - bottom, width - right, height - bottom, "axis"))
    parts.append(text((left + width - right) / 2, height - 6, x_title, "tick", "middle"))
    names = []
    for curve in curves:
        points = [at(x, y) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="4 4"' if curve.is_dashed else ""
        marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in points) if curve.has_marks else ""
        parts.append(
            f'<g class="curve {curve.style}"><title>{escaped(curve.hint)}</title>'
            f'<polyline points="{path}"{dashes}/>{marks}</g>'
        )
        names.append((points[-1], curve))
    heights = spread_labels([end[1] for end, _ in names], top - 6, height - bottom + 4)
    for (end, curve), y in zip(names, heights, strict=True):
        x = width - right + 10
        parts.append(f'<g class="{curve.style}">{line(end[0] + 4, end[1], x - 2, y, "leader")}')
        parts.append(text(x + 2, y + 4, curve.name, "curve-name", hint=curve.hint) + "</g>")
    return svg(width, height, name, parts)


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


def _shortened(content: str, length: int) -> str:
    return content if len(content) <= length else content[: length - 1].rstrip() + "…"
