"""Packed cuts: which samples of a window are put end to end in one micro-batch, and which rank computes it.

Nothing is padded, so a micro-batch's tokens are those of its samples, and samples of unlike length go together well.
Integers in, integers out: nothing here knows a device or a model.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distaccum.planning.costs import CostModel


def cut_packed(
    lengths: NDArray[np.int64],
    *,
    world_size: int,
    max_tokens: int,
    equal_micro_steps: bool = False,
    costs: CostModel | None = None,
    speeds: Sequence[float] | None = None,
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Deals the samples of a window out to ranks, and packs those of a rank into as few micro-batches as they fill.

    Samples go out longest first, each to the rank that would be done with it first (Graham 1969), which puts it into
    the fullest micro-batch that has room (best-fit decreasing) or begins another one, whose overhead counts.

    Args:
        lengths: of the window's samples, by their position in it; at least 1 each.
        max_tokens: most tokens in a micro-batch. A longer sample is a micro-batch of its own.
        equal_micro_steps: give all ranks the same number of micro-steps.
        costs: of a micro-batch: Σ length (1 + quadratic · length) + overhead, as attention stays inside each sample.
        speeds: of the ranks, which then get costs in proportion to them. Default: all alike.

    Returns:
        Positions in the window, for each rank and micro-step. An empty micro-step is a placeholder.
    """
    costs = costs or CostModel()
    order = np.argsort(-lengths, kind="stable")
    slowness = max(speeds) / np.array(speeds, dtype=np.float64) if speeds else np.ones(world_size)
    unit_costs = costs.of_sample(lengths.astype(np.float64))
    times, room = np.zeros(world_size), np.zeros(world_size, dtype=np.int64)
    ranks = [_Bins(max_tokens) for _ in range(world_size)]
    for sample, length, cost in zip(order.tolist(), lengths[order].tolist(), unit_costs[order].tolist(), strict=True):
        after = times + (cost + costs.overhead * (room < length)) * slowness
        rank = int(after.argmin())
        times[rank] = after[rank]
        room[rank] = ranks[rank].add(sample, length)
    steps = [rank.steps for rank in ranks]
    if equal_micro_steps:
        most = max(map(len, steps))
        for rank_steps in steps:
            while len(rank_steps) < most and _split_largest(rank_steps):
                pass
    most = max(map(len, steps)) if equal_micro_steps else 1
    # The costliest micro-step comes last: its backward is what the gradient sync hides behind.
    return tuple(
        ((),) * (most - len(rank)) + tuple(map(tuple, sorted(rank, key=lambda step: float(unit_costs[step].sum()))))
        for rank in steps
    )


class _Bins:
    """The micro-batches of one rank, each with the tokens that it still has room for."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._free: list[tuple[int, int]] = []
        """Free tokens and number of each micro-batch that has room, least first."""
        self.steps: list[list[int]] = []

    def add(self, sample: int, length: int) -> int:
        """Adds a sample where it leaves least room; returns the tokens that the emptiest micro-batch has room for."""
        place = bisect_left(self._free, (length, -1))
        if place < len(self._free):
            free, number = self._free.pop(place)
        else:
            free, number = max(self._max_tokens, length), len(self.steps)
            self.steps.append([])
        self.steps[number].append(sample)
        if free > length:
            insort(self._free, (free - length, number))
        return self._free[-1][0] if self._free else 0


def _split_largest(steps: list[list[int]]) -> bool:
    """Makes two of the micro-step with most samples; False if each has one sample at most."""
    largest = max(steps, key=len, default=[])
    if len(largest) < 2:
        return False
    steps.remove(largest)
    steps += [largest[::2], largest[1::2]]  # they are sorted by length, so both get long ones and short ones
    return True
