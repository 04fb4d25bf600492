"""Decides which samples each micro-batch of a rank has, for all windows of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distaccum.errors import require
from distaccum.planning.batch_plan import BatchPlan
from distaccum.planning.by_length import Grouping, Timeline
from distaccum.planning.costs import CostModel
from distaccum.planning.lengths import EpochLengths
from distaccum.planning.order import ENDLESS, EpochOrder, InOrder
from distaccum.planning.recut import recut, size_of_half
from distaccum.planning.window_sizes import BatchSizes, ConstantSize, SizeRule

_even_cut = lru_cache(maxsize=64)(BatchPlan.cut)  # windows have few sizes, and ranks the same speeds for long


@lru_cache(maxsize=64)
def _even_bounds(
    plan: BatchPlan, size: int, speeds: tuple[float, ...] | None, parts: int, rank: int
) -> list[tuple[int, int]]:
    return list(_even_cut(plan, size, speeds, parts).micro_batches(rank))


class CutSchedule:
    """Cuts each window of a run for one rank.

    What is measured on the way changes the cuts of windows to come: speeds of the ranks, costs of micro-batches, sizes
    that micro-batches come down to when memory runs out, sizes of windows that follow the noise scale. A change comes
    into force with the first window that no rank can have begun to load.

    Args:
        plan: global batch, ranks, micro-batch.
        num_samples: samples of the dataset.
        rank: whose micro-batches these are.
        seed: decides the order of the samples together with the epoch.
        drop_last: leave out an epoch's last window when it is smaller than planned.
        size_rule: sizes of the windows. Default: all have the global batch size.
        lengths: of all samples; given, windows are cut by length. Integers in an array, of any size and mapped from a
            file or not, are used as they are. With `EpochLengths`, the indices of micro-batches count on from epoch to
            epoch: `index % num_samples` is the dataset's.
        max_tokens, overhead: as for `Grouping`.
        split_every: cut each so-many-th window into two micro-steps where it would be one on one rank.
        windows_ahead: most windows that may have begun to load before the one in use is done.
        is_ordered: the dataset's indices are positions in an order that it has itself.

    Attributes:
        plan: as given, but with the micro-batch of `set_sizes`.
        sizes: numbers of samples of the windows.
        lengths: of all samples, where windows are cut by length: sizes of micro-batches are in tokens then.
        is_packed: the samples of a micro-batch are put end to end, so that its tokens are theirs, without padding.
        is_ordered: as given.
        found_sizes: largest micro-batch that was found to fit on each rank; None where the plan says it.
        limits: sizes that micro-batches of each rank have come down to because memory ran out, as far as known.

    Raises:
        UserError: the plan, the sizes and the lengths don't fit the dataset.
    """

    def __init__(
        self,
        plan: BatchPlan,
        num_samples: int,
        *,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        size_rule: SizeRule | None = None,
        lengths: Sequence[int] | NDArray[Any] | EpochLengths | None = None,
        max_tokens: int | None = None,
        is_packed: bool = False,
        overhead: float = 1 / 64,
        split_every: int | None = None,
        windows_ahead: int = 0,
        is_ordered: bool = False,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.windows_ahead = windows_ahead
        self.sizes = BatchSizes(size_rule or ConstantSize(plan.global_batch_size), num_samples, drop_last)
        base = self.sizes.rule.base
        require(
            base == plan.global_batch_size,
            f"the schedule of batch sizes is made for a global batch of {base}, and the plan's is "
            f"{plan.global_batch_size}: give both the same.",
        )
        self.sizes.check(plan.world_size)
        self._grouping = None
        if lengths is not None:
            self._grouping = Grouping(
                lengths, plan, num_samples, max_tokens, windows_ahead, overhead, is_packed=is_packed
            )
        self.lengths = self._grouping.lengths if self._grouping is not None else None
        self.is_packed = self._grouping is not None and is_packed
        self.found_sizes: tuple[int, ...] | None = None
        self.limits: tuple[int | None, ...] = (None,) * plan.world_size
        self._limit: Timeline[int | None] = Timeline(None)
        self._speeds: Timeline[tuple[float, ...] | None] = Timeline(None)
        self.is_ordered = is_ordered
        counts_on = isinstance(self.lengths, EpochLengths)
        self._order = InOrder() if is_ordered else EpochOrder(num_samples, seed, counts_on=counts_on)
        self._split_every = split_every

    # Cuts

    def micro_batches(self, epoch: int, index: int, limit: int | None = None) -> list[list[int]]:
        """Returns the dataset indices of this rank's micro-batches of a window.

        Args:
            epoch, index: of the window, whose index counts in its epoch.
            limit: largest size allowed; None for what was in force when the window began to load.
        """
        number = self.sizes.number(epoch, index)
        pieces = self._planned(epoch, index, number)
        limit = limit or self._limit.at(number)
        return pieces if limit is None else recut(pieces, limit, self.lengths, self.is_packed)

    def samples(self, epoch: int, index: int) -> NDArray[np.int64]:
        """Returns the dataset indices of a window, over all ranks."""
        return self._order.samples(epoch, *self.sizes.bounds(epoch)[index])

    def micro_batch_sizes(self, epoch: int, index: int) -> tuple[int, ...]:
        """Returns the number of samples of each of this rank's micro-batches of a window."""
        number = self.sizes.number(epoch, index)
        if self._grouping is None and self._limit.at(number) is None:
            return _even_cut(self.plan, self.sizes.size(epoch, index), *self._even(number)).sizes[self.rank]
        return tuple(map(len, self.micro_batches(epoch, index)))

    def placeholder(self, epoch: int, index: int) -> list[int]:
        """Returns the dataset indices of a placeholder: a window's first sample."""
        first = self.sizes.bounds(epoch)[index][0]
        return self._order.samples(epoch, first, first + 1).tolist()  # type: ignore[no-any-return]

    def _planned(self, epoch: int, index: int, number: int) -> list[list[int]]:
        start, stop = self.sizes.bounds(epoch)[index]
        if self._grouping is not None:
            order = self._order.samples(epoch, start, stop)
            groups = self._grouping.cut(order, number, self._speeds.at(number))[self.rank]
            return [order[list(group)].tolist() for group in groups]
        bounds = _even_bounds(self.plan, stop - start, *self._even(number), self.rank)
        first = bounds[0][0]
        samples = self._order.samples(epoch, start + first, start + bounds[-1][1]).tolist()
        return [samples[begin - first : end - first] for begin, end in bounds]

    def _even(self, number: int) -> tuple[tuple[float, ...] | None, int]:
        """Returns what an even cut of a window depends on beside plan and size: speeds, least number of parts."""
        parts = 2 if self._split_every is not None and (number + 1) % self._split_every == 0 else 1
        return self._speeds.at(number), parts

    @property
    def unit(self) -> str:
        """The unit of sizes of micro-batches: "samples", or "tokens" where windows are cut by length."""
        return "samples" if self.lengths is None else "tokens"

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of a micro-batch where windows are cut by length; a longer sample is one of its own."""
        return self._grouping.max_tokens if self._grouping is not None else None

    @property
    def micro_batch_size(self) -> int:
        """Samples of the largest micro-batch; where windows are cut by length, of the longest that fit into one."""
        if self._grouping is not None:
            return max(1, self._grouping.max_tokens // self._grouping.lengths.longest)
        return max(size for sizes in self.plan.cut(self.plan.global_batch_size).sizes for size in sizes)

    def explain(self) -> str:
        """Says in one line how a window is cut."""
        how = None
        if self._grouping is not None:
            kind = "packed" if self.is_packed else "by length"
            how = f"micro-steps of at most {self._grouping.max_tokens} tokens, {kind}"
        if self.sizes.is_constant:
            num_samples = self.sizes.num_samples if self.sizes.num_samples < ENDLESS else None
            return self.plan.explain(num_samples, self.sizes.drop_last, how)
        return f"{self.plan.explain(how=how)}; sizes by schedule: {self.sizes.rule}"

    # Sizes of micro-batches

    def set_sizes(self, sizes: Sequence[int]) -> None:
        """Sets the largest micro-batch of each rank, in place of `micro_batch_size` or `max_tokens`, before any window.

        Where all ranks must agree on the cut (equal micro-steps, cuts by length) the smallest of them counts.

        Args:
            sizes: in samples, or in tokens where windows are cut by length.
        """
        self.found_sizes = tuple(sizes)
        if self._grouping is not None:
            self._grouping.set_max_tokens(min(sizes))
        else:
            size = min(sizes) if self.plan.equal_micro_steps else sizes[self.rank]
            self.plan = replace(self.plan, micro_batch_size=size, accumulation_steps=None)

    @property
    def limit(self) -> int | None:
        """Size that this rank's micro-batches have come down to because memory ran out; None if it never did."""
        return self._limit.latest

    def split(self, samples: Sequence[int]) -> list[list[int]]:
        """Cuts a micro-batch into one or more of the sizes that are allowed by now."""
        return [list(samples)] if self.limit is None else recut([samples], self.limit, self.lengths, self.is_packed)

    def forbid(self, samples: Sequence[int], now: int) -> int:
        """Forbids micro-batches of this size on this rank; returns the size that is allowed from now on.

        Args:
            now: number of the window in use.
        """
        half = size_of_half(samples, self.lengths, self.is_packed)
        limit = half if self.limit is None else min(half, self.limit)
        # What has been asked of workers by now comes as it was cut before, and is cut anew by those who use it.
        self._limit.change(limit, self._first_free(now), now)
        self.limits = (*self.limits[: self.rank], limit, *self.limits[self.rank + 1 :])
        return limit

    # Changes by measurements

    @property
    def shares(self) -> tuple[float, ...]:
        """Each rank's share of a window, as it was set last."""
        return self._speeds.latest or (1 / self.plan.world_size,) * self.plan.world_size

    def set_shares(self, shares: tuple[float, ...], now: int) -> None:
        """Sets the ranks' shares of windows to come; `now` is the number of the window in use."""
        self._speeds.change(shares, self._first_free(now), now)

    @property
    def known_overhead(self) -> float | None:
        """The overhead of a micro-step that stays a guess, in tokens: where samples are packed, nothing tells it."""
        return self._grouping.costs.latest.overhead if self._grouping is not None and self.is_packed else None

    def set_costs(self, costs: CostModel, now: int) -> None:
        """Sets what micro-batches of windows to come cost, where these are cut by length."""
        assert self._grouping is not None
        self._grouping.costs.change(costs, self._first_free(now), now)

    def set_window_size(self, size: int, now: int) -> int:
        """Sets the size of windows to come; returns the number of the first one. For sizes by `NoiseSizes` alone."""
        # One window later than cuts change: whether an epoch has another window may depend on its size.
        first = self._first_free(now) + 1
        self.sizes.change(size, first)
        return first

    def work(self, micro_batches: Sequence[Sequence[int]], number: int) -> float:
        """Returns the work in micro-batches of a window, in units that are the same for all ranks.

        Args:
            micro_batches: their samples, by dataset indices.
            number: of the window.
        """
        if self._grouping is None:
            return float(sum(map(len, micro_batches)))
        return self._grouping.cost(micro_batches, number)

    def _first_free(self, now: int) -> int:
        """Returns the first window that no rank can have begun to load."""
        return now + self.windows_ahead + 1

    # State

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been put in force since the beginning; all else follows from the arguments."""
        state: dict[str, Any] = {"speeds": self._speeds.changes, **self.sizes.state_dict()}
        if self._grouping is not None:
            costs = self._grouping.costs.changes
            state["costs"] = [[first, value.quadratic, value.overhead] for first, value in costs]
        if self.found_sizes is not None:
            state |= {"found_sizes": self.found_sizes, "limits": self.limits}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`'s answer, as far as it fits: speeds and sizes are those of as many ranks."""
        if self.found_sizes is not None and len(state.get("found_sizes") or ()) == self.plan.world_size:
            sizes = state["found_sizes"]
            if self.plan.equal_micro_steps:  # smaller ones may be why the run has been started again
                sizes = [min(pair) for pair in zip(sizes, self.found_sizes, strict=True)]
            self.set_sizes(sizes)
            self.limits = tuple(state["limits"])
            self._limit = Timeline(self.limits[self.rank])
        self.sizes.load_state_dict(state)
        speeds = [(first, tuple(values) if values is not None else None) for first, values in state["speeds"]]
        if all(values is None or len(values) == self.plan.world_size for _, values in speeds):
            self._speeds.changes = speeds
        if self._grouping is not None and "costs" in state:
            self._grouping.costs.changes = [
                (first, CostModel(quadratic=quadratic, overhead=overhead))
                for first, quadratic, overhead in state["costs"]
            ]
