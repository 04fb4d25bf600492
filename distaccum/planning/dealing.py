"""Deals parts of a window, sorted by length, out to ranks, so that the ranks finish together.

Samples are known by their places in the order of their lengths, longest first, and a part by where it begins and ends
there. So a part's cost, and that of what it may be cut into, is a multiplication.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Part = tuple[float, int, int]
"""The negative cost of a part, where it begins, and where it ends. So parts are sorted by cost, largest first."""

_WORTH_A_MOVE = 0.01
"""A part is moved if the rank that takes longest gets faster by this fraction at least."""
_CLOSE_ENOUGH = 0.01
"""Nothing is searched for any more when the ranks could at best be faster by this fraction, all alike."""
_LARGEST_LOOKED_AT = 8
"""Parts of a rank that are tried out in one move."""
_MOST_TRIES = 8
"""Further tries, each with the largest part of the slowest rank cut in half, after one has not helped."""
_MOST_DEALT = 2500
"""Parts dealt in all tries together, which bounds the time that they take."""


class Dealer:
    """Deals parts to ranks.

    Parts go to ranks largest first, each to the rank that would be done with it first (Graham 1969). Then parts of the
    rank that takes longest go to others, whole or cut where both ranks are done at the same time, as long as that makes
    the longest time shorter. What has been cut is dealt anew, and the best dealing counts.

    Args:
        unit_costs: of a sample of each place, in a part that begins there.
        overhead: of a part.
        speeds: of the ranks.
    """

    def __init__(self, unit_costs: Sequence[float], overhead: float, speeds: Sequence[float]) -> None:
        self._unit_costs = unit_costs
        self._overhead = overhead
        self._slowness = max(speeds) / np.array(speeds, dtype=np.float64)
        self._is_equal = min(speeds) == max(speeds)
        self._power = sum(1.0 / slow for slow in self._slowness.tolist())

    def part(self, start: int, stop: int) -> Part:
        return -((stop - start) * self._unit_costs[start] + self._overhead), start, stop

    def deal(self, parts: Iterable[tuple[int, int]]) -> list[list[Part]]:
        """Returns the parts of each rank, largest first."""
        dealt, left = 0, _MOST_TRIES
        best: list[list[Part]] = []
        shortest = np.inf
        now = [self.part(*part) for part in parts]
        while True:
            ranks, times = self._largest_first(now)
            self._balance(ranks, times)
            longest = float(times.max())
            is_better = longest < shortest * 0.999
            if longest < shortest:
                shortest, best = longest, [list(rank) for rank in ranks]
            now = [part for rank in ranks for part in rank]
            dealt += len(now)
            is_close = shortest <= (1 + _CLOSE_ENOUGH) * -sum(part[0] for part in now) / self._power
            if len(ranks) == 1 or is_close or dealt >= _MOST_DEALT:
                return best
            if is_better:
                left = _MOST_TRIES
                continue
            large = next((part for part in ranks[int(times.argmax())] if part[2] - part[1] > 1), None)
            if not left or large is None:
                return best
            left -= 1
            now.remove(large)
            middle = (large[1] + large[2]) // 2
            now += [self.part(large[1], middle), self.part(middle, large[2])]

    def _largest_first(self, parts: list[Part]) -> tuple[list[list[Part]], NDArray[np.float64]]:
        """Returns the parts of each rank, and the times that the ranks take."""
        times = np.zeros(len(self._slowness))
        ranks: list[list[Part]] = [[] for _ in times]
        if self._is_equal:
            heap = [(0.0, rank) for rank in range(len(ranks))]
            for part in sorted(parts):
                time, rank = heap[0]
                heapq.heapreplace(heap, (time - part[0], rank))
                ranks[rank].append(part)
            for time, rank in heap:
                times[rank] = time
            return ranks, times
        for part in sorted(parts):
            after = times - part[0] * self._slowness
            rank = int(after.argmin())
            times[rank] = after[rank]
            ranks[rank].append(part)
        return ranks, times

    def _balance(self, ranks: list[list[Part]], times: NDArray[np.float64]) -> None:
        """Moves parts away from the rank that takes longest, in place, as long as that helps."""
        while len(ranks) > 1:
            slowest = int(times.argmax())
            longest = float(times[slowest])
            tried = [self._move(part, slowest, times) for part in ranks[slowest][:_LARGEST_LOOKED_AT]]
            after, part, start, to = min(tried)
            if longest - after <= _WORTH_A_MOVE * longest:
                return
            ranks[slowest].remove(part)
            times[slowest] += part[0] * self._slowness[slowest]
            for rank, begin, end in ((slowest, part[1], start), (to, start, part[2])):
                if begin < end:
                    piece = self.part(begin, end)
                    insort(ranks[rank], piece)
                    times[rank] -= piece[0] * self._slowness[rank]

    def _move(self, part: Part, slowest: int, times: NDArray[np.float64]) -> tuple[float, Part, int, int]:
        """Returns the best way to take a part from a rank, or all of it from one of its samples on.

        Returns:
            The longer time of both ranks after that, the part, the place from which on samples go, and the rank that
            they go to.
        """
        negative, start, stop = part
        slow = float(self._slowness[slowest])
        rest = float(times[slowest]) + negative * slow
        times_after = times - negative * self._slowness
        times_after[slowest] = np.inf
        to = int(times_after.argmin())
        best = (max(rest, float(times_after[to])), part, start, to)
        if stop - start < 2:
            return best
        times_after = times - negative / 2 * self._slowness
        times_after[slowest] = np.inf
        to = int(times_after.argmin())
        other_slow, other_time = float(self._slowness[to]), float(times[to])

        def times_when_cut(place: int) -> tuple[float, float]:
            kept, moved = self.part(start, place)[0], self.part(place, stop)[0]
            return rest - kept * slow, other_time - moved * other_slow

        # The first grows with the place and the second falls: the best place is where they cross.
        low, high = start + 1, stop - 1
        while low < high:
            place = (low + high) // 2
            kept, moved = times_when_cut(place)
            low, high = (place + 1, high) if kept < moved else (low, place)
        for place in {low, max(low - 1, start + 1)}:
            best = min(best, (max(times_when_cut(place)), part, place, to))
        return best
