"""The time of an update over a network: the alpha-beta model of a ring all-reduce, and its fit to measurements.

    all-reduce of B bytes over N ranks = 2 (N − 1) · α + 2 (N − 1) / N · B / β

(Thakur, Rabenseifner and Gropp 2005): α is the time of each of the ring's 2 (N − 1) steps however little is sent, β the
bytes per second of a rank's link. Nothing here needs a device or a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SHARE_OF_BACKWARD = 2 / 3
"""Share of a micro-step: each layer's backward multiplies two matrices where its forward multiplies one."""
_SMALLEST_SLOPE = 1e-4
"""Smallest share of a large all-reduce's time that is due to its bytes and still shows a speed."""


@dataclass(frozen=True, slots=True)
class Link:
    """The link of each rank to the others."""

    latency_seconds: float
    """α, the time of one step of the ring."""
    bytes_per_second: float
    """β, in each direction."""

    def all_reduce_seconds(self, num_bytes: float, world_size: int) -> float:
        """Returns the seconds of one all-reduce.

        >>> Link(latency_seconds=0.001, bytes_per_second=1e6).all_reduce_seconds(1e6, world_size=2)
        1.002
        """
        steps = 2 * (world_size - 1)
        return steps * self.latency_seconds + steps / world_size * num_bytes / self.bytes_per_second


def fit_link(seconds: Mapping[int, float], world_size: int) -> Link:
    """Fits a link to bare all-reduces.

    Args:
        seconds: by the bytes that were reduced. The slope of the larger ones gives β, the smallest all-reduce α: the
            intercept of the line would include the bytes that a link's buffers take at once.
    """
    smallest, *sizes = sorted(seconds)
    steps = 2 * (world_size - 1)
    sent = [steps / world_size * size for size in sizes]
    per_byte, _ = np.polyfit(sent, [seconds[size] for size in sizes], 1)
    # With a link so fast that only noise is measured, the slope may be zero or negative.
    fastest = max(one / seconds[size] for one, size in zip(sent, sizes, strict=True))
    is_slope = per_byte * sent[-1] > _SMALLEST_SLOPE * seconds[sizes[-1]]
    bytes_per_second = 1 / float(per_byte) if is_slope else fastest
    latency = seconds[smallest] / steps - smallest / world_size / bytes_per_second
    return Link(max(0.0, latency), bytes_per_second)


@dataclass(frozen=True, slots=True)
class ComputeTime:
    """The time of a rank's update without other ranks, as a function of its micro-steps."""

    fixed_seconds: float
    """Seconds of the optimizer's step, of clipping and of clearing gradients."""
    micro_step_seconds: float

    def seconds(self, micro_steps: float) -> float:
        return self.fixed_seconds + micro_steps * self.micro_step_seconds


def fit_compute(seconds: Mapping[int, float]) -> ComputeTime:
    """Fits a straight line to the seconds of updates by their number of micro-steps; neither part is negative."""
    steps = sorted(seconds)
    if len(steps) == 1:
        return ComputeTime(0.0, seconds[steps[0]] / steps[0])
    # Weighted so that each counts by its relative error: a micro-step more of sixteen is noise, of one it is not.
    weights = [1 / seconds[count] for count in steps]
    slope, intercept = np.polyfit(steps, [seconds[count] for count in steps], 1, w=weights)
    if slope <= 0:
        return ComputeTime(min(seconds.values()), 0.0)
    if intercept < 0:
        return ComputeTime(0.0, float(np.median([seconds[count] / count for count in steps])))
    return ComputeTime(float(intercept), float(slope))


def update_seconds(
    compute_seconds: float, micro_step_seconds: float, buckets: Sequence[float], link: Link, world_size: int
) -> float:
    """Returns the seconds of an update whose last backward sends its gradients bucket by bucket.

    A bucket is ready when its part of the backward is done, and is sent when the one before it has arrived. The update
    waits for those that have not arrived at the end of the backward.

    Args:
        compute_seconds: time of the whole update without other ranks.
        micro_step_seconds: the last micro-step's part of it.
        buckets: bytes of each, in the order in which they are sent.
    """
    backward = _SHARE_OF_BACKWARD * micro_step_seconds
    total = sum(buckets)
    ready, arrived = 0.0, 0.0
    for size in buckets:
        ready += backward * size / total
        arrived = max(ready, arrived) + link.all_reduce_seconds(size, world_size)
    return compute_seconds + max(0.0, arrived - backward)


def buckets_of(num_bytes: float, count: int) -> list[float]:
    """Returns the bytes of DDP's buckets, of which the first holds at most 1 MiB so that it is sent early.

    >>> buckets_of(5 * 2**20, 3)
    [1048576.0, 2097152.0, 2097152.0]
    """
    if count <= 1:
        return [num_bytes]
    first = min(2.0**20, num_bytes / count)
    return [first] + [(num_bytes - first) / (count - 1)] * (count - 1)
