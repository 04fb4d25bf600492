"""Cuts by length: which samples of a window share a micro-batch, and which rank computes it.

The update doesn't depend on the cut, so samples of like length are put together, where little is padded, and the groups
are dealt out so that the ranks finish together. Which samples make up the window stays exactly as random as before.
Integers in, integers out: nothing here knows a device or a model.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from distaccum.errors import UserError
from distaccum.planning.batch_plan import BatchPlan
from distaccum.planning.costs import CostModel
from distaccum.planning.dealing import Dealer, Part
from distaccum.planning.lengths import EpochLengths, SampleLengths
from distaccum.planning.packed import cut_packed

_MOST_BLOCKS = 512
"""Windows of more samples than this are grouped in blocks of several, which bounds the time that it takes."""


def cut_by_length(
    lengths: NDArray[np.int64],
    *,
    world_size: int,
    max_tokens: int,
    equal_micro_steps: bool = False,
    costs: CostModel | None = None,
    speeds: Sequence[float] | None = None,
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Groups the samples of a window by length and deals the groups out to ranks.

    The grouping is the cheapest there is among those that keep the samples in the order of their lengths (dynamic
    programming over where to cut). Groups are dealt as `Dealer` says, which splits them where that helps the rank that
    takes longest.

    Args:
        lengths: of the window's samples, by their position in it; at least 1 each.
        max_tokens: most tokens in a micro-batch, padding included. A longer sample is a micro-batch of its own.
        equal_micro_steps: give all ranks the same number of micro-steps.
        costs: of a micro-batch.
        speeds: of the ranks, which then get costs in proportion to them. Default: all alike.

    Returns:
        Positions in the window, for each rank and micro-step. An empty micro-step is a placeholder.
    """
    costs = costs or CostModel()
    order = np.argsort(-lengths, kind="stable")
    longest_first = lengths[order].astype(np.float64)
    groups = _cheapest_groups(longest_first, max_tokens, costs)
    dealer = Dealer(costs.of_sample(longest_first).tolist(), costs.overhead, speeds or [1.0] * world_size)
    ranks = dealer.deal(groups)
    if equal_micro_steps:
        most = max(map(len, ranks))
        for rank in ranks:
            while len(rank) < most and _split_largest(rank, dealer):
                pass
    most = max(map(len, ranks)) if equal_micro_steps else 1
    samples = order.tolist()
    # The costliest micro-step comes last: its backward is what the gradient sync hides behind.
    return tuple(
        ((),) * (most - len(rank)) + tuple(tuple(samples[start:stop]) for _, start, stop in reversed(rank))
        for rank in ranks
    )


def _cheapest_groups(longest_first: NDArray[np.float64], max_tokens: int, costs: CostModel) -> list[tuple[int, int]]:
    """Cuts the samples where the sum of costs is least and no group is over the budget; returns bounds of groups."""
    count = len(longest_first)
    starts = np.arange(0, count, -(-count // _MOST_BLOCKS))
    ends = np.append(starts[1:], count)
    longest = longest_first[starts]  # of a group that begins with the block
    # Of groups from a block (column) to a block (row). What is above the diagonal is no group, and not looked at.
    counts = (ends[:, None] - starts).astype(np.float64)
    group_costs = counts * costs.of_sample(longest) + costs.overhead
    is_too_large = counts * longest > max_tokens
    np.fill_diagonal(is_too_large, False)  # a single block is always allowed: it is cut further below
    group_costs[is_too_large] = np.inf
    best = np.zeros(len(starts) + 1)
    came_from = []
    for stop in range(1, len(starts) + 1):
        total = best[:stop] + group_costs[stop - 1, :stop]
        came_from.append(int(total.argmin()))
        best[stop] = total[came_from[-1]]
    groups: list[tuple[int, int]] = []
    block = len(starts)
    while block:
        first, stop = int(starts[came_from[block - 1]]), int(ends[block - 1])
        fits = max(1, max_tokens // int(longest_first[first]))
        groups += [(start, min(start + fits, stop)) for start in range(first, stop, fits)]
        block = came_from[block - 1]
    return groups


def _split_largest(rank: list[Part], dealer: Dealer) -> bool:
    """Makes two micro-steps of a rank's largest one that can be split; False if none can."""
    part = next((part for part in rank if part[2] - part[1] > 1), None)
    if part is None:
        return False
    rank.remove(part)
    middle = (part[1] + part[2]) // 2
    for bounds in ((part[1], middle), (middle, part[2])):
        insort(rank, dealer.part(*bounds))
    return True


class Grouping:
    """Cuts a run's windows by length, or packs them, each by the costs in force for it.

    Args:
        lengths: of all samples of the dataset.
        plan: global batch, ranks, micro-batch.
        num_samples: samples of the dataset.
        max_tokens: most tokens in a micro-batch, padding included. None: `micro_batch_size` times the longest sample.
        windows_ahead: most windows that may have begun to load before the one in use is done.
        overhead: what a micro-step costs however small it is, in parts of one of `max_tokens`: a guess that holds until
            costs are measured.
        is_packed: put samples end to end without padding, as `cut_packed` does.

    Raises:
        UserError: the lengths can't be those of the dataset.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[Any] | EpochLengths,
        plan: BatchPlan,
        num_samples: int,
        max_tokens: int | None,
        windows_ahead: int = 0,
        overhead: float = 1 / 64,
        *,
        is_packed: bool = False,
    ) -> None:
        self._overhead = overhead
        name = "batch=packed" if is_packed else "batch=by_length"
        self.lengths: SampleLengths
        self.lengths = lengths if isinstance(lengths, EpochLengths) else SampleLengths(lengths, num_samples, name)
        self.is_packed = is_packed
        self._plan = plan
        if plan.accumulation_steps is not None:
            raise UserError(
                f"accumulation_steps={plan.accumulation_steps} can't be given with lengths: the number of micro-steps "
                "follows from them. Give micro_batch_size or max_tokens."
            )
        self._most_known = windows_ahead + 4  # the one in use, its neighbours, and those that are being loaded ahead
        self._known: dict[int, tuple[tuple[tuple[int, ...], ...], ...]] = {}
        self.set_max_tokens(max_tokens or (plan.micro_batch_size or 1) * self.lengths.longest)

    def set_max_tokens(self, max_tokens: int) -> None:
        """Sets the budget of a micro-batch, before any window has been cut."""
        self.max_tokens = max_tokens
        self.costs = Timeline(CostModel(overhead=max_tokens * self._overhead))
        self._known.clear()

    def cut(
        self, samples: NDArray[np.int64], number: int, speeds: Sequence[float] | None = None
    ) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Cuts a window; returns positions in it, for each rank and micro-step.

        Args:
            samples: the window's samples, by their indices in the dataset.
            number: of the window, counted over all epochs.
            speeds: of the ranks, in force for the window.
        """
        if number not in self._known:
            if len(self._known) >= self._most_known:
                self._known.pop(next(iter(self._known)))
            self._known[number] = (cut_packed if self.is_packed else cut_by_length)(
                self.lengths[samples],
                world_size=self._plan.world_size,
                max_tokens=self.max_tokens,
                equal_micro_steps=self._plan.equal_micro_steps,
                costs=self.costs.at(number),
                speeds=speeds,
            )
        return self._known[number]

    def cost(self, groups: Iterable[Sequence[int]], number: int) -> float:
        """Returns the cost of micro-batches (of indices in the dataset) together in a window."""
        costs, total = self.costs.at(number), 0.0
        for group in groups:
            if len(group):
                lengths = self.lengths[list(group)].astype(np.float64)
                padded = lengths if self.is_packed else np.full_like(lengths, lengths.max())
                total += float(costs.of_sample(padded).sum()) + costs.overhead
        return total


T = TypeVar("T")


class Timeline(Generic[T]):
    """A value that changes from one window to the next, for all ranks alike and ahead of what is being loaded."""

    def __init__(self, first_value: T) -> None:
        self.changes = [(0, first_value)]

    def at(self, number: int) -> T:
        """The value in force for a window."""
        if len(self.changes) == 1:  # quicker, and nearly always so
            return self.changes[0][1]
        return next((value for first, value in reversed(self.changes) if first <= number), self.changes[0][1])

    @property
    def latest(self) -> T:
        """The value that was put in force last."""
        return self.changes[-1][1]

    def change(self, value: T, first: int, now: int = 0) -> None:
        """Puts another value in force, from a window on that no rank has begun to load.

        Args:
            now: the window in use; what was in force only before it is forgotten.
        """
        over = [number for number, (start, _) in enumerate(self.changes) if start <= now]
        self.changes = [*self.changes[over[-1] if over else 0 :], (first, value)]
