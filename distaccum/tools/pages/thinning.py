"""Chooses from thousands of points those to draw on a few hundred pixels, so that none is lost that stands out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Point = tuple[float, float]


def thinned(points: Sequence[Point], most: int = 600) -> list[Point]:
    """Returns at most about `most` points: lowest and highest of each of equal stretches, and the first and the last.

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


def moving_median(points: Sequence[Point], length: int, most: int = 600) -> list[Point]:
    """Returns the medians of `length` values in a row, each at the middle one, without single spikes.

    At both ends they are of fewer values, as many on either side. Values that are not finite are left out. Of more
    points than `most`, evenly spaced ones are taken.

    >>> moving_median([(1, 1.0), (2, 9.0), (3, 2.0), (4, 3.0)], 3)
    [(1, 1.0), (2, 2.0), (3, 3.0), (4, 3.0)]
    """
    half = length // 2
    step = max(1, -(-len(points) // most))
    medians = []
    for index in sorted({*range(0, len(points), step), len(points) - 1}):
        reach = min(half, index, len(points) - 1 - index)
        values = [y for _, y in points[index - reach : index + reach + 1] if math.isfinite(y)]
        medians.append((points[index][0], statistics.median(values) if values else math.nan))
    return medians
