"""Lines with their names at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distaccum.pages.svg import escaped, line, nice_ticks, svg, text

_LABEL_GAP = 14.5


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
