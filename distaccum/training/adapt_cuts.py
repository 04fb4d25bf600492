"""Measuring what micro-batches cost and how fast ranks are, and cutting the windows to come accordingly.

All ranks see the same numbers at the same update and so come to the same cuts, which begin with a window that none of
them has started to load. The update does not depend on any of this, but for sizes that follow the noise scale.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.accumulation.result import UpdateResult
from distaccum.loaders import Window, WindowLoader
from distaccum.planning.by_length import CostFit
from distaccum.planning.window_sizes import NoiseSizes
from distaccum.strategies import Strategy

logger = logging.getLogger(__name__)

_LIMIT = "largest micro-batch"
"""Report: what micro-batches of a rank have come down to because memory ran out; 0 if it didn't."""
_SPEED = "speed"
"""Report: what a rank computes per second."""
_UPDATES_TO_FIT_COSTS_AT = (4, 16, 64)
_UPDATES_BETWEEN_BALANCING = 4
_UPDATES_TO_REMEMBER = 8
"""A rank's speed is the median over so many updates: one that was disturbed does not count."""
_LEAST_SHARE = 0.25
"""Of an even share, for a rank that takes as many micro-steps as the others."""
_WORTH_A_CHANGE = 0.05
"""Shares stay as they are unless one would change by more than this part of itself."""


class CutTuning:
    """Watches the updates of a run and tunes how its windows are cut.

    Args:
        measure_costs, balance_speed: as the trainer has them.
        noise_scale: that the sizes of windows follow, if the loader has a schedule that asks for it.

    Attributes:
        reports: what the accumulator is to ask each rank for.

    Raises:
        UserError: the strategy's ranks wait for each other in every layer, so that their speeds can't be told.
    """

    def __init__(
        self,
        loader: WindowLoader,
        strategy: Strategy,
        *,
        measure_costs: bool = True,
        balance_speed: bool = False,
        noise_scale: NoiseScale | None = None,
        recovers: bool = False,
    ) -> None:
        self._loader = loader
        self.noise_scale = noise_scale
        self._strategy = strategy
        self._fit = CostFit() if measure_costs and loader.grouping is not None else None
        self._balances = balance_speed and strategy.world_size > 1
        self._own_clock = strategy.own_clock() if self._balances else None
        self._own_speed = 0.0
        self._seen = 0
        self._reported: deque[tuple[float, ...]] = deque(maxlen=_UPDATES_TO_REMEMBER)
        self.reports: dict[str, Callable[[], float]] = {}
        if self._balances:
            self.reports[_SPEED] = lambda: self._own_speed
        if recovers:
            self.reports[_LIMIT] = lambda: float(loader.limit or 0)

    @property
    def needs_times(self) -> bool:
        """Whether the accumulator is to time the micro-steps of the next window."""
        return (self._balances and self._own_clock is None) or self._fit is not None

    def after_update(self, update: int, window: Window, result: UpdateResult) -> None:
        """Takes the measurements of an update (counted from 1); changes the cuts of windows to come."""
        if _LIMIT in result.reports:
            self._loader.limits = tuple(int(size) or None for size in result.reports[_LIMIT])
        if self.noise_scale is not None and result.noise_scale is not None:
            self._follow_noise(update, window, self.noise_scale)
        self._seen += 1
        if self._seen == 1:
            if self._own_clock is not None:
                self._own_clock()
            return  # much is done for the first time in this process
        if update > _UPDATES_TO_FIT_COSTS_AT[-1]:
            self._fit = None
        if self._fit is not None:
            self._measure_costs(self._fit, update, window, result)
        if self._balances:
            self._measure_speed(window, result)
            self._balance(update, window, result.reports[_SPEED])

    def _follow_noise(self, update: int, window: Window, noise: NoiseScale) -> None:
        sizes = self._loader.sizes
        if not isinstance(sizes.rule, NoiseSizes):
            return
        if self._number(window) < sizes.rule.changes[-1][0]:
            return  # what was measured last has not come into force yet
        wanted = self._of_rank_0(sizes.rule.wanted(noise.scale, noise.measurements))
        if wanted is not None:
            # One window later than cuts change: whether an epoch has another window may depend on its size.
            first = self._first_free(window) + 1
            sizes.change(wanted, first)
            logger.info(
                "update %d: noise scale %.4g; %d samples per update from update %d on",
                update,
                noise.scale,
                wanted,
                update + first - self._number(window),
            )

    def _of_rank_0(self, value: Any) -> Any:
        """Rank 0's value: on unlike devices the last bit may be another."""
        values = [value]
        if self._strategy.process_group is not None:
            dist.broadcast_object_list(values, group_src=0, group=self._strategy.process_group)
        return values[0]

    def _first_free(self, window: Window) -> int:
        """The first window that no rank can have begun to load."""
        return self._number(window) + self._loader.windows_ahead + 1

    def _number(self, window: Window) -> int:
        return self._loader.number(window.epoch, window.index)

    def _measure_costs(self, fit: CostFit, update: int, window: Window, result: UpdateResult) -> None:
        grouping = self._loader.grouping
        assert grouping is not None
        for samples, seconds in zip(window.sample_indices, result.micro_seconds, strict=True):
            if samples:
                fit.add(len(samples), int(grouping.lengths[samples].max()), seconds)
        if update not in _UPDATES_TO_FIT_COSTS_AT:
            return
        if (found := self._of_rank_0(fit.fit())) is not None:
            grouping.costs.change(found, self._first_free(window), self._number(window))
            logger.debug("costs of a micro-batch from update %d on: %s", update, found)

    def _measure_speed(self, window: Window, result: UpdateResult) -> None:
        """Work per second of this rank, in units that are the same for all: samples, or costs by length."""
        grouping = self._loader.grouping
        number = self._number(window)
        work = float(sum(window.sizes)) if grouping is None else grouping.cost(window.sample_indices, number)
        seconds = self._own_clock() if self._own_clock is not None else sum(result.micro_seconds)
        if work and seconds:
            self._own_speed = work / seconds

    def _balance(self, update: int, window: Window, reported: tuple[float, ...]) -> None:
        if not all(reported):
            return  # not measured on all ranks yet
        self._reported.append(reported)
        if update % _UPDATES_BETWEEN_BALANCING:
            return
        speeds = [statistics.median(of_a_rank) for of_a_rank in zip(*self._reported, strict=True)]
        if self._strategy.equal_micro_steps:
            # Each rank takes equally many, however small its share. What one costs beside its samples then weighs the
            # more the fewer these are, and a share would shrink for having shrunk.
            mean = statistics.fmean(speeds)
            speeds = [max(speed, _LEAST_SHARE * mean) for speed in speeds]
        wanted = [speed / sum(speeds) for speed in speeds]
        in_force = self._loader.speeds.changes[-1][1] or (1 / len(wanted),) * len(wanted)
        if max(abs(new / old - 1) for new, old in zip(wanted, in_force, strict=True)) > _WORTH_A_CHANGE:
            self._loader.speeds.change(tuple(wanted), self._first_free(window), self._number(window))
            shown = ", ".join(f"{share:.1%}" for share in wanted)
            logger.info("update %d: shares of the ranks by their speed: %s", update, shown)
