"""Adapts the cuts of windows to come to what has been measured: speeds of ranks, costs of micro-batches, noise."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.accumulation.result import UpdateResult
from distaccum.loaders import Window
from distaccum.planning import CutSchedule
from distaccum.planning.costs import CostFit
from distaccum.planning.window_sizes import NoiseSizes
from distaccum.runtime.nested import gather_objects
from distaccum.strategies import Strategy

logger = logging.getLogger(__name__)

_LIMIT = "largest micro-batch"
"""Report: the size that micro-batches of a rank have come down to because memory ran out; 0 if it didn't."""
_SPEED = "speed"
"""Report: the work that a rank does per second."""
_UPDATES_TO_FIT_COSTS_AT = (4, 16, 64)
_UPDATES_BETWEEN_BALANCING = 4
_UPDATES_TO_REMEMBER = 8
"""A rank's speed is the median over so many updates: one that was disturbed does not count."""
_LEAST_SHARE = 0.25
"""The least part of an even share for a rank that takes as many micro-steps as the others."""
_WORTH_A_CHANGE = 0.05
"""Shares stay as they are unless one would change by more than this part of itself."""


class CutTuning:
    """Measures what micro-batches cost and how fast ranks are, and changes the cuts of windows to come accordingly.

    All ranks see the same numbers at the same update and so come to the same cuts. The update does not depend on any of
    this, but for sizes of windows that follow the noise scale.

    Args:
        cuts: of the windows.
        strategy: of the placed model.
        measure_costs: fit what micro-batches cost, if windows are cut by length.
        balance_speed: give ranks shares of each window in proportion to their measured speed.
        noise_scale: measures how noisy gradients are; sizes of windows follow it if they are `NoiseSizes`.
        recovers: ranks go on with smaller micro-batches when memory runs out, of whose size all ranks keep account.

    Attributes:
        noise_scale: as given.
        reports: numbers that the accumulator asks each rank for.

    Raises:
        UserError: the strategy's ranks wait for each other in every layer, so that their speeds can't be measured.
    """

    def __init__(
        self,
        cuts: CutSchedule,
        strategy: Strategy,
        *,
        measure_costs: bool = True,
        balance_speed: bool = False,
        noise_scale: NoiseScale | None = None,
        recovers: bool = False,
    ) -> None:
        self.noise_scale = noise_scale
        self._cuts = cuts
        self._strategy = strategy
        self._fit = CostFit(cuts.known_overhead) if measure_costs and cuts.lengths is not None else None
        self._balances = balance_speed and strategy.world_size > 1
        self._own_clock = strategy.own_clock() if self._balances else None
        self._own_speed = 0.0
        self._seen = 0
        self._reported: deque[tuple[float, ...]] = deque(maxlen=_UPDATES_TO_REMEMBER)
        self.reports: dict[str, Callable[[], float]] = {}
        if self._balances:
            self.reports[_SPEED] = lambda: self._own_speed
        if recovers:
            self.reports[_LIMIT] = lambda: float(cuts.limit or 0)

    @property
    def needs_times(self) -> bool:
        """Whether the accumulator is to time the micro-steps of the next window."""
        return (self._balances and self._own_clock is None) or self._fit is not None

    def after_update(self, update: int, window: Window, result: UpdateResult) -> None:
        """Takes the measurements of an update (counted from 1); changes the cuts of windows to come."""
        if _LIMIT in result.reports:
            self._cuts.limits = tuple(int(size) or None for size in result.reports[_LIMIT])
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
        rule = self._cuts.sizes.rule
        if not isinstance(rule, NoiseSizes) or window.number < rule.changes[-1][0]:
            return  # what was measured last has not come into force yet
        wanted = self._of_rank_0(rule.wanted(noise.scale, noise.measurements))
        if wanted is not None:
            first = self._cuts.set_window_size(wanted, now=window.number)
            logger.info(
                "update %d: noise scale %.4g; %d samples per update from update %d on",
                update,
                noise.scale,
                wanted,
                update + first - window.number,
            )

    def _of_rank_0(self, value: Any) -> Any:
        """Returns rank 0's value: on unlike devices the last bit may be another."""
        return gather_objects(value, self._strategy.process_group)[0]

    def _measure_costs(self, fit: CostFit, update: int, window: Window, result: UpdateResult) -> None:
        lengths = self._cuts.lengths
        assert lengths is not None
        for samples, seconds in zip(window.sample_indices, result.micro_seconds, strict=True):
            if samples and self._cuts.is_packed:
                fit.add_packed(lengths[samples], seconds)
            elif samples:
                fit.add(len(samples), int(lengths[samples].max()), seconds)
        if update not in _UPDATES_TO_FIT_COSTS_AT:
            return
        if (found := self._of_rank_0(fit.fit())) is not None:
            self._cuts.set_costs(found, now=window.number)
            logger.debug("costs of a micro-batch from update %d on: %s", update, found)

    def _measure_speed(self, window: Window, result: UpdateResult) -> None:
        work = self._cuts.work(window.sample_indices, window.number)
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
        wanted = tuple(speed / sum(speeds) for speed in speeds)
        if max(abs(new / old - 1) for new, old in zip(wanted, self._cuts.shares, strict=True)) > _WORTH_A_CHANGE:
            self._cuts.set_shares(wanted, now=window.number)
            shown = ", ".join(f"{share:.1%}" for share in wanted)
            logger.info("update %d: shares of the ranks by their speed: %s", update, shown)
