"""The arithmetic of memory: peaks at other micro-batches, and the largest micro-batch that fits.

A peak is the maximum over several moments, each of which holds a constant and a number of bytes per sample; so it is a
convex, piecewise linear function of the micro-batch. It is interpolated between measured sizes; beyond them it has the
slope of the last piece, and before them that of the first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PeakLine:
    """A peak, in bytes, as a function of the micro-batch's samples.

    Attributes:
        points: measured peaks by number of samples; at least one. With one alone, the peak is taken as constant.
    """

    points: Mapping[int, int]

    def at(self, samples: int) -> int:
        """Returns the peak with micro-batches of a number of samples."""
        sizes = sorted(self.points)
        if len(sizes) == 1:
            return self.points[sizes[0]]
        place = min(max(bisect_left(sizes, samples), 1), len(sizes) - 1)
        low, high = sizes[place - 1], sizes[place]
        slope = (self.points[high] - self.points[low]) / (high - low)
        return round(self.points[low] + slope * (samples - low))

    def largest(self, limit: float, most: int) -> int:
        """Returns the most samples, up to `most`, whose peak is within a limit; 0 if not even one sample's is."""
        return bisect_right(range(1, most + 1), limit, key=self.at)


def sizes_to_measure(micro_batch: int, most: int, least: int = 1) -> list[int]:
    """Sizes of micro-batches from which the peak at `micro_batch` follows: at most three, the smallest first.

    Args:
        most: samples that there are.
        least: the smallest size to measure beside `micro_batch` itself.
    """
    least = min(micro_batch, least)
    wanted = {max(least, micro_batch // 4), max(least, micro_batch // 2), micro_batch}
    if micro_batch == 1:
        wanted.add(2)
    return sorted({size for size in wanted if size <= most} or {most})
