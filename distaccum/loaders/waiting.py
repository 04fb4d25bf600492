"""Finds out whether the training waits for data, and how many workers it takes so that it doesn't."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from distaccum.config.launcher import launch
from distaccum.loaders.fetch import BatchSource
from distaccum.loaders.load_clock import LoadTimes
from distaccum.loaders.options import DEFAULT_AHEAD, MOST_AHEAD, LoaderOptions

logger = logging.getLogger(__name__)

WORTH_SAYING = 0.1
"""Part of the time that may pass with waiting for data."""
_MOST_WORKERS = 16
"""That `auto` takes."""

_WORTH_A_WORKER = 0.5e-3
"""Seconds: handing a micro-batch over from another process takes about as long."""
_MARGIN = 1.25
"""Workers take turns, and not all micro-batches take equally long."""
_TO_SAY, _TO_DECIDE = (3, 10.0), (2, 1.0)
"""Windows and seconds that a period has at least: in the course of a run, and before `auto` decides."""
_ENOUGH_WINDOWS = 20
"""However short they are, `auto` decides after so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A period of training, as its loader has seen it.

    Attributes:
        step: seconds from one micro-batch to the next, in the mean.
        waited: part of it spent waiting for the micro-batch.
        load: what a micro-batch took to load.
        num_workers: loaded them; 0: the training process did.
        is_hidden: a GPU may have computed while the host waited.
    """

    step: float
    waited: float
    load: LoadTimes
    num_workers: int
    is_hidden: bool = False

    @property
    def share(self) -> float:
        """The part of the time that was spent waiting for data."""
        return self.waited / self.step

    @property
    def is_held_up(self) -> bool:
        """Whether loading is what the training waits for: it takes about all the time that there is for it."""
        return self.load.seconds / max(1, self.num_workers) > self.step / _MARGIN

    @property
    def cores_for_loading(self) -> float:
        """Processor cores of this rank beside the one that trains; half of that one, if there is no other."""
        cores = len(os.sched_getaffinity(0)) / launch().local_world_size
        return max(cores - 1, 1.0 if self.is_hidden else 0.5)

    def workers(self, prefetch_factor: int | None) -> tuple[int, int | None]:
        """Returns how many workers are enough, and how many micro-batches each is to load ahead.

        There are no more of them than cores for what they compute: what waits for a disk or a network takes none.
        """
        load = self.load
        if load.seconds < _WORTH_A_WORKER:
            return 0, None
        computing = max(self.step - self.waited, 1e-6)
        wanted = self.num_workers
        if self.is_held_up or not wanted:
            wanted = math.ceil(_MARGIN * load.seconds / computing)
        busy = max(load.processor_seconds / load.seconds, 1e-3)
        most = min(_MOST_WORKERS, max(1, MOST_AHEAD // (prefetch_factor or 2)), int(self.cores_for_loading / busy))
        workers = min(wanted, most)
        if workers == 0:
            return 0, None
        if prefetch_factor is None:
            # So that the others are not out of micro-batches before the slowest one is loaded.
            needed = math.ceil(load.longest / (workers * computing))
            prefetch_factor = min(max(needed, 2), MOST_AHEAD // workers)
        return workers, prefetch_factor

    def __str__(self) -> str:
        load, train = (f"{1e3 * value:.3g} ms" for value in (self.load.seconds, self.step - self.waited))
        return f"a micro-batch takes {load} to load and {train} to train on"

    def advice(self, prefetch_factor: int | None) -> tuple[str, str] | None:
        """Returns what would make the training wait less: a word for the kind, and a sentence; None for nothing."""
        if self.share <= WORTH_SAYING or self.load.seconds < _WORTH_A_WORKER:
            return None
        workers, _ = self.workers(prefetch_factor)
        takes = str(self)
        if not self.num_workers:
            return "none", f"{takes}, one after the other: set data.num_workers=auto"
        if self.is_held_up:
            if workers > self.num_workers:
                return "few", f"{takes}, with data.num_workers={self.num_workers}: set auto, or {workers}"
        elif not self.is_hidden:
            return "uneven", (
                f"{takes}, but the slowest one took {self.load.longest:.3g} s to load: set a larger "
                "data.prefetch_factor"
            )
        else:
            return None
        if self.load.processor_seconds < self.load.seconds / 2:
            return "storage", f"{takes}, most of it waiting for the storage: copy the data to a faster one"
        return "cores", (
            f"{takes}, and there is no core left for another worker: give each rank more cores, or make samples "
            "cheaper to load (smaller files, decoded or tokenised beforehand)"
        )


class Waits:
    """Measures how long the micro-batches of windows are waited for, and decides on workers where that is left to it.

    Args:
        options: those of the loader.

    Attributes:
        advice: what would make the training wait less, as `Measured.advice` says it of the last period; None as long
            as the training doesn't wait.
        share: the part of that period spent waiting; 0 without advice.
    """

    def __init__(self, options: LoaderOptions) -> None:
        self._options = options
        self._is_decided = not options.is_auto
        self.advice: tuple[str, str] | None = None
        self.share = 0.0
        self._is_first = True
        """Whether the next window is the first one of its workers: it opens files, and fills queues."""
        self._begin()

    def _begin(self) -> None:
        self._windows, self._micro_batches, self._seconds = 0, 0, 0.0
        self._waited, self._longest = 0.0, 0.0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Passes micro-batches on, and measures how long each is waited for."""
        # Keeps no micro-batch, as a generator would while the next one is waited for.
        return map(self.next_of, repeat(batches))

    def next_of(self, batches: Iterator[Any]) -> Any:
        """Returns the next micro-batch, and counts how long it was waited for."""
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        self._waited += waited
        self._longest = max(self._longest, waited)
        return batch

    def end_window(self, source: BatchSource, micro_batches: int, seconds: float) -> bool:
        """Counts a window; returns whether the source has got other workers, so that it has to begin again.

        Args:
            seconds: from the window's first micro-batch until the next window is asked for.
        """
        if self._is_first:
            self._is_first = False
            source.load_times()
            self._begin()
            return False
        self._windows += 1
        self._micro_batches += micro_batches
        self._seconds += seconds
        windows, least = _TO_SAY if self._is_decided else _TO_DECIDE
        if self._windows < windows or (self._seconds < least and (self._is_decided or self._windows < _ENOUGH_WINDOWS)):
            return False
        measured = self._measured(source)
        self._begin()
        if measured is None:
            return False
        has_changed = self._options.is_auto and self._decide(source, measured)
        self._is_first = has_changed
        self.advice = None if has_changed else measured.advice(self._options.prefetch_factor)
        self.share = measured.share if self.advice else 0.0
        return has_changed

    def _measured(self, source: BatchSource) -> Measured | None:
        count = max(1, self._micro_batches)
        load = source.load_times()
        if not source.options.num_workers:
            # Not what the processor does of it: that clock is a system call, and `auto` measures it in a worker.
            load = LoadTimes(seconds=self._waited / count, processor_seconds=0.0, longest=self._longest)
        if load is None:
            return None
        return Measured(
            step=self._seconds / count,
            waited=self._waited / count,
            load=load,
            num_workers=source.options.workers,
            is_hidden=source.options.copies_ahead,
        )

    def _decide(self, source: BatchSource, measured: Measured) -> bool:
        """Gives the source the workers that it needs; later on only more of them, and none if it has none."""
        workers, ahead = measured.workers(self._options.prefetch_factor)
        before = source.options
        if self._is_decided and not 0 < before.workers < workers:
            return False
        self._is_decided = True
        loads = f"{workers} worker{'s' * (workers > 1)} with {ahead} micro-batches ahead" if workers else "no worker"
        logger.info("data.num_workers=auto: %s, as %s", loads, measured)
        if (workers, ahead) == (before.workers, before.prefetch_factor or DEFAULT_AHEAD):
            return False
        source.use_workers(workers, ahead)
        return True
