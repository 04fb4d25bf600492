"""Makes scalable vector graphics, as text.

Colours are CSS classes, so that the page's style sheet sets them, for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from markupsafe import Markup

from distaccum.observers.formatting import byte_size


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start", hint: str = "") -> str:
    title = f"<title>{escape(hint)}</title>" if hint else ""
    css = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{title}{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def svg(
    width: float, height: float, name: str, parts: Sequence[str], attributes: Mapping[str, str] | None = None
) -> Markup:
    """Returns a picture, with what it shows in words for readers who don't see it."""
    body = "\n".join(parts)
    more = "".join(f' {key}="{escape(value)}"' for key, value in (attributes or {}).items())
    frame = f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(name)}"{more}'
    return Markup(f"<svg {frame}>\n{body}\n</svg>")


def nice_ticks(largest: float, count: int = 5, binary: bool = False) -> list[float]:
    """Returns round numbers from 0 to about `largest`, at most `count` steps.

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


def shortened(content: str, length: int) -> str:
    """Returns `content`, or its beginning with an ellipsis, in at most `length` characters."""
    return content if len(content) <= length else content[: length - 1].rstrip() + "…"


def axis_ticks(low: float, high: float, count: int = 5, is_log: bool = False) -> list[float]:
    """Returns round numbers from `low` to `high`, at most about `count` of them.

    >>> axis_ticks(0.013, 0.094), axis_ticks(2.0, 700.0, is_log=True)
    ([0.02, 0.04, 0.06, 0.08], [3.0, 10.0, 30.0, 100.0, 300.0])
    """
    if not is_log:
        steps = nice_ticks(high - low, count)
        if len(steps) < 2:
            return [low]
        step = steps[1]
        first = math.ceil(low / step - 1e-9)
        return [float(f"{index * step:.12g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if math.log10(high / low) < 0.7:
        return axis_ticks(low, high, count)
    every = max(1, math.ceil((last - first) / (count + 1)))
    powers = [10.0**exponent for exponent in range(first, last + 1, every)]
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [factor * power for power in powers for factor in factors if low <= factor * power * (1 + 1e-9)]
        ticks = [tick for tick in ticks if tick <= high * (1 + 1e-9)]
        if len(ticks) <= count + 1 or len(factors) == 1:
            break
    return [float(f"{tick:.12g}") for tick in ticks]


def short(value: float) -> str:
    """Returns a number as text for an axis, with as few characters as it takes.

    >>> short(12500), short(2e6), short(0.02), short(3e-5), short(0)
    ('12.5k', '2M', '0.02', '3e-5', '0')
    """
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        digits, _, exponent = f"{value:.3g}".partition("e")
        return f"{digits}e{int(exponent)}" if exponent else digits
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def bytes_tick(value: float) -> str:
    """Returns bytes as text for an axis with ticks at powers of two."""
    return "0" if value == 0 else byte_size(int(value)).replace(".0 ", " ")
