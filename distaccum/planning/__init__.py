"""Windows and their cuts as index arithmetic: integers in, integers out, no torch."""

from __future__ import annotations

from distaccum.planning.batch_plan import (
    DEFAULT_MICRO_BATCH_SIZE,
    BatchPlan,
    Cut,
    resolve_batch,
    split_evenly,
    window_bounds,
)
from distaccum.planning.cut_schedule import CutSchedule
from distaccum.planning.lengths import EpochLengths
from distaccum.planning.order import shuffled

__all__ = [
    "DEFAULT_MICRO_BATCH_SIZE",
    "BatchPlan",
    "Cut",
    "CutSchedule",
    "EpochLengths",
    "resolve_batch",
    "shuffled",
    "split_evenly",
    "window_bounds",
]
