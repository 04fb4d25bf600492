"""Formats numbers for people: short, and of nearly the same width from line to line."""

from __future__ import annotations

import math
from collections.abc import Mapping


def number(value: float, decimals: int = 4) -> str:
    """Formats `value` with so many decimals, fewer from 10 up, and an exponent where those would hide it.

    >>> number(0.43121), number(43.121), number(0.00004)
    ('0.4312', '43.121', '4.00e-05')
    """
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    if magnitude >= 1e6 or 0 < magnitude < 1e-3:
        return f"{value:.2e}"
    before_the_point = math.floor(math.log10(magnitude)) if magnitude >= 10 else 0
    return f"{value:.{max(0, decimals - before_the_point)}f}"


def noise_text(scale: float, error: float) -> str:
    """Formats a noise scale and its error, in samples.

    >>> noise_text(812.4, 35.2), noise_text(812.4, math.inf), noise_text(math.inf, math.inf)
    ('812 ± 35', '812', 'unknown')
    """
    if not math.isfinite(scale):
        return "unknown"
    digits = 1 if scale < 10 else 0
    return f"{scale:,.{digits}f}" + (f" ± {error:,.{digits}f}" if math.isfinite(error) else "")


def rate(value: float) -> str:
    """Formats a speed in three digits or more.

    >>> rate(3214.4), rate(32.14), rate(0.3214)
    ('3,214', '32.1', '0.32')
    """
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def clock(seconds: float) -> str:
    """Formats seconds as hours, minutes and seconds; hours go on counting past a day.

    >>> clock(14.2), clock(93784)
    ('0:00:14', '26:03:04')
    """
    if not math.isfinite(seconds):
        return "-:--:--"
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def duration(seconds: float) -> str:
    """Formats a measured time, with tenths of a second below a minute.

    >>> duration(14.23), duration(74.2)
    ('14.2 s', '0:01:14')
    """
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def byte_size(count: int) -> str:
    """Formats bytes in the binary unit that leaves one to four digits before the point.

    >>> byte_size(512), byte_size(432_328_704)
    ('512 B', '412.3 MiB')
    """
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def words(name: str) -> str:
    """Returns the name of a metric or a reference in words: `unigram_entropy` is `unigram entropy`."""
    return name.replace("_", " ")


def evaluation_text(metrics: Mapping[str, float], references: Mapping[str, float]) -> str:
    """Formats an evaluation's metrics, with the losses to compare the loss with right behind it.

    >>> evaluation_text({"loss": 2.1, "accuracy": 0.98}, {"unigram_entropy": 3.2})
    'loss 2.1000 (unigram entropy 3.2000), accuracy 0.9800'
    """
    compared = ", ".join(f"{words(name)} {number(value)}" for name, value in references.items())
    texts = []
    for name, value in metrics.items():
        texts.append(f"{words(name)} {number(value)}")
        if name == "loss" and compared:
            texts[-1] += f" ({compared})"
    if compared and "loss" not in metrics:
        texts.append(f"to compare: {compared}")
    return ", ".join(texts)
