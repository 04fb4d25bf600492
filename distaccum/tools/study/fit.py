"""Fits how many updates and samples a target takes at each batch size: McCandlish et al. 2018, section 2.3.

A target that takes S updates and E samples at some batch size obeys (S / S_min - 1) (E / E_min - 1) = 1. With E = S B,
that is S = S_min (1 + B_crit / B) and E = E_min (1 + B / B_crit), where B_crit = E_min / S_min is the critical batch
size: there, a target takes twice the fewest updates and twice the fewest samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = 200
"""Values of the critical batch size that are tried, equal factors apart."""
_BEYOND = 100.0
"""The critical batch size is looked for up to so many times beyond the batch sizes that were tried."""
_HUBER = 1.345
"""Errors beyond so many times their usual size count less than by their square (Huber 1964)."""
_LEAST_ERROR = 0.05
"""Two runs that differ in their seed alone differ by more than that in what a target takes: no error is smaller."""
_LIKELY = (39.9, 10.1, 10.1, 7.7, 6.6, 6.0, 5.6, 5.3)
"""How much a sum of squares, in units of the error's, may rise if the error follows from 1, 2, … points more than
unknowns: the square of Student's t at 0.95, less for the fewest points. With errors of a tenth, the range then holds
what is true in about nine of ten studies."""
_LIKELY_OF_MANY = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The updates and samples that a target took at one batch size."""

    batch_size: float
    """Samples per update, as measured."""
    updates: float
    samples: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The two numbers that all batch sizes share, and their uncertainty."""

    min_updates: float
    """S_min: updates that the target takes with an endless batch."""
    min_samples: float
    """E_min: samples that it takes with the smallest batch."""
    critical_batch_size: float
    """E_min / S_min."""
    low: float
    """The critical batch size may be as small as this; 0 if the points set no lower limit."""
    high: float
    """It may be as large as this; infinite if the points set no upper limit."""
    relative_error: float
    """Typical distance of a point from the curve, as a part of its value (at least 0.05)."""
    num_points: int

    def updates(self, batch_size: float) -> float:
        """Updates that the target takes at a batch size."""
        return self.min_updates * (1 + self.critical_batch_size / batch_size)

    def samples(self, batch_size: float) -> float:
        """Samples that it takes."""
        return self.min_samples * (1 + batch_size / self.critical_batch_size)


def fit(points: Sequence[Measured]) -> Fit | None:
    """Fits the curve to points, whose errors are taken to be equal parts of their values; None for fewer than two.

    Of each critical batch size the best S_min follows; the best of them all has the least sum of errors, in which
    points that lie far off count less. What range is likely follows from how fast that sum rises around it.
    """
    usable = [point for point in points if point.updates > 0 and point.batch_size > 0]
    sizes = sorted({point.batch_size for point in usable})
    if len(sizes) < 2:
        return None
    candidates = between(sizes[0] / _BEYOND, sizes[-1] * _BEYOND)
    # The size of errors and the curve follow from each other.
    error = _LEAST_ERROR
    best = 0
    for _ in range(4):
        sums = [_loss_at(critical, usable, error) for critical in candidates]
        best = min(range(len(sums)), key=sums.__getitem__)
        error = max(_LEAST_ERROR, _spread(candidates[best], usable))
    spare = len(usable) - 2
    rise = _LIKELY[spare - 1] if 0 < spare <= len(_LIKELY) and error > _LEAST_ERROR else _LIKELY_OF_MANY
    likely = [index for index, value in enumerate(sums) if value - sums[best] <= rise]
    finer = between(candidates[max(0, best - 1)], candidates[min(best + 1, _STEPS - 1)], 41)
    critical = min(finer, key=lambda value: _loss_at(value, usable, error))
    log_updates = _log_min_updates(critical, usable, error)
    return Fit(
        min_updates=math.exp(log_updates),
        min_samples=math.exp(log_updates) * critical,
        critical_batch_size=critical,
        low=0.0 if likely[0] == 0 else candidates[likely[0]],
        high=math.inf if likely[-1] == len(candidates) - 1 else candidates[likely[-1]],
        relative_error=error,
        num_points=len(usable),
    )


def between(low: float, high: float, steps: int = _STEPS) -> list[float]:
    """Returns numbers from `low` to `high`, equal factors apart."""
    return [low * (high / low) ** (index / (steps - 1)) for index in range(steps)]


def _residuals(critical: float, log_updates: float, points: Sequence[Measured]) -> list[float]:
    return [math.log(point.updates) - log_updates - math.log1p(critical / point.batch_size) for point in points]


def _log_min_updates(critical: float, points: Sequence[Measured], error: float) -> float:
    """The best log S_min for a critical batch size: Huber's mean, by weights that follow from the errors."""
    logs = _residuals(critical, 0.0, points)
    center = sorted(logs)[len(logs) // 2] if len(logs) > 2 else sum(logs) / len(logs)
    for _ in range(20):
        weights = [min(1.0, _HUBER * error / max(abs(value - center), 1e-12)) for value in logs]
        before, center = center, sum(w * value for w, value in zip(weights, logs, strict=True)) / sum(weights)
        if abs(center - before) < 1e-4 * error:
            break
    return center


def _loss_at(critical: float, points: Sequence[Measured], error: float) -> float:
    total = 0.0
    for residual in _residuals(critical, _log_min_updates(critical, points, error), points):
        size = abs(residual) / error
        total += size**2 if size <= _HUBER else _HUBER * (2 * size - _HUBER)
    return total


def _spread(critical: float, points: Sequence[Measured]) -> float:
    """The typical residual, of which one that is far off says little; 0 for as many points as there are unknowns."""
    residuals = sorted(
        abs(value) for value in _residuals(critical, _log_min_updates(critical, points, _LEAST_ERROR), points)
    )
    if len(residuals) <= 2:
        return 0.0
    limit = 3 * residuals[len(residuals) // 2]
    # Two unknowns take up two of the points.
    return math.sqrt(sum(min(value, limit) ** 2 for value in residuals) / (len(residuals) - 2))
