"""Times bare all-reduces: the network without a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

SIZES = (256, 2**20, 2 * 2**20, 4 * 2**20, 8 * 2**20)
"""Bytes of the all-reduces that a link is fitted to. The smallest costs latency alone, and is more than one number,
which gloo would send as a single message where it sends anything longer as several."""

_SECONDS_OF_COMPUTING = 1e-3
_TIMES_AS_OFTEN = 8
"""Small all-reduces are measured more often than large ones by this factor: their times vary more."""


def time_all_reduces(sizes: Sequence[int], rounds: int, device: torch.device) -> dict[int, float]:
    """Returns the median seconds of an all-reduce over all ranks, by its bytes. Every rank calls it.

    Each comes after some computing, as in an update: the backend's threads have gone to sleep by then, and the ranks
    don't come at the same moment. In a tight loop or just after a barrier, a small one takes a fraction of that.

    Args:
        rounds: measurements of each large one.
    """
    seconds = {}
    matrix = torch.ones(128, 128, device=device)
    for size in sizes:
        tensor = torch.zeros(size // 4, device=device)
        taken = []
        for _ in range(1 + rounds * (_TIMES_AS_OFTEN if size < 2**16 else 1)):
            until = time.perf_counter() + _SECONDS_OF_COMPUTING
            while time.perf_counter() < until:
                matrix @ matrix
            _finish(device)
            started = time.perf_counter()
            dist.all_reduce(tensor)
            _finish(device)
            taken.append(time.perf_counter() - started)
        seconds[size] = statistics.median(taken[1:])  # the first one makes connections
    return seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
