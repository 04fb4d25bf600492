"""Scalable vector graphics by hand: their parts as text.

Colours are classes, so that the page's style sheet decides on them, for light and for dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence


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


def shortened(content: str, length: int) -> str:
    """`content`, or its beginning with an ellipsis, in at most `length` characters."""
    return content if len(content) <= length else content[: length - 1].rstrip() + "…"
