"""Thousands of points on a few hundred pixels: which ones to draw, so that none is missed that stands out."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]


def thinned(points: Sequence[Point], most: int = 600) -> list[Point]:
    """At most about so many points: of each of equal stretches, the lowest and the highest; the first and the last.

    So a spike of one update stays in sight. A stretch in which a value is not finite keeps one of those too: a gap.

    >>> thinned([(0, 5.0), (1, 1.0), (2, 9.0), (3, 4.0), (4, 4.0), (5, 2.0)], most=4)
    [(0, 5.0), (1, 1.0), (2, 9.0), (3, 4.0), (5, 2.0)]
    """
    if len(points) <= most:
        return list(points)
    stretches = max(1, most // 2)
    kept = {0, len(points) - 1}
    for number in range(stretches):
        first, last = number * len(points) // stretches, (number + 1) * len(points) // stretches
        indices = range(first, last)
        finite = [index for index in indices if math.isfinite(points[index][1])]
        if finite:
            kept.add(min(finite, key=lambda index: points[index][1]))
            kept.add(max(finite, key=lambda index: points[index][1]))
        if len(finite) < len(indices):
            kept.add(next(index for index in indices if not math.isfinite(points[index][1])))
    return [points[index] for index in sorted(kept)]


def moving_mean(points: Sequence[Point], length: int) -> list[Point]:
    """The mean of so many points in a row, at the middle one; values that are not finite are left out of it.

    At both ends the mean is of fewer points, as many on either side.

    >>> moving_mean([(1, 1.0), (2, 2.0), (3, 6.0)], 3)
    [(1, 1.0), (2, 3.0), (3, 6.0)]
    """
    half = length // 2
    means = []
    # Running sums would carry an infinity, and the rounding of a huge loss, to all points after it.
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        values = [y for _, y in points[index - reach : index + reach + 1] if math.isfinite(y)]
        means.append((x, sum(values) / len(values) if values else math.nan))
    return means
