"""Measures, in the worker processes, what the loading of micro-batches takes."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, get_worker_info

_SECONDS, _PROCESSOR, _COUNT, _LONGEST = range(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadTimes:
    """Times of loading micro-batches, in the mean.

    Attributes:
        seconds: of one micro-batch.
        processor_seconds: part of it in which the processor worked; the rest is waiting, for a disk or a network.
        longest: seconds of the slowest one.
    """

    seconds: float
    processor_seconds: float
    longest: float


class LoadClock:
    """Numbers that workers write and the training process reads, in shared memory.

    Args:
        num_workers: each of them has a row of its own, so that none waits for another.
    """

    def __init__(self, num_workers: int) -> None:
        self._shared = multiprocessing.RawArray("d", 4 * num_workers)
        self._before = np.zeros(4)

    def add(self, worker: int, seconds: float, processor_seconds: float) -> None:
        """Counts a micro-batch that this worker has loaded."""
        row, shared = 4 * worker, self._shared
        shared[row + _SECONDS] += seconds
        shared[row + _PROCESSOR] += processor_seconds
        shared[row + _COUNT] += 1
        shared[row + _LONGEST] = max(shared[row + _LONGEST], seconds)

    def take(self) -> LoadTimes | None:
        """Returns what has been measured since the last call; None if nothing was."""
        rows = np.frombuffer(self._shared).reshape(-1, 4)
        totals, longest = rows.sum(axis=0), float(rows[:, _LONGEST].max())
        rows[:, _LONGEST] = 0.0
        seconds, processor, count, _ = totals - self._before
        self._before = totals
        if not count:
            return None
        return LoadTimes(seconds=float(seconds / count), processor_seconds=float(processor / count), longest=longest)


class Timed(Dataset[Any]):
    """A dataset whose items are timed in the worker that loads them."""

    def __init__(self, dataset: Dataset[Any], clock: LoadClock) -> None:
        self._dataset = dataset
        self._clock = clock

    def __getitem__(self, request: Any) -> Any:
        started, processor = time.perf_counter(), time.process_time()
        loaded = self._dataset[request]
        worker = get_worker_info()
        self._clock.add(
            worker.id if worker is not None else 0, time.perf_counter() - started, time.process_time() - processor
        )
        return loaded
