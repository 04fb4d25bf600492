"""Says when a rank waits for data, and what would help."""

from __future__ import annotations

import logging
from collections.abc import Callable

from distaccum.accumulation.result import UpdateResult
from distaccum.loaders import WindowLoader

logger = logging.getLogger(__name__)

_WAITING = "waiting for data"
"""Report: the part of the last period that a rank has waited, where something would help; else 0."""


class DataWaits:
    """Follows how long ranks wait for data.

    Args:
        loader: of this rank.

    Attributes:
        reports: numbers that the accumulator asks each rank for.
        share: the part of the last period that the rank which waited longest has waited; 0 if it is hardly anything.
    """

    def __init__(self, loader: WindowLoader) -> None:
        self._loader = loader
        self._said: set[str] = set()
        self.share = 0.0
        self.reports: dict[str, Callable[[], float]] = {_WAITING: lambda: loader.waits.share}

    def after_update(self, result: UpdateResult) -> None:
        """Takes what ranks have reported; on the one that waits longest, says what would help, each advice once."""
        shares = result.reports[_WAITING]
        self.share = max(shares)
        advice = self._loader.waits.advice
        if advice is None or self._loader.cuts.rank != shares.index(self.share):
            return
        kind, sentence = advice
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("waiting for data takes %.0f %% of the time: %s", 100 * self.share, sentence)
