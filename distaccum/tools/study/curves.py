"""What a point's `metrics.jsonl` says of its target: smoothed curves, and when they cross it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distaccum.config.enums import Goal
from distaccum.observers.metrics_reading import Metrics, read_metrics

TRAIN_LOSS = "train/loss"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """A place on a point's curve."""

    updates: float
    samples: float
    seconds: float
    """In updates, evaluations left out."""
    value: float
    """The target's metric, smoothed."""


@dataclass(kw_only=True, slots=True)
class Learning:
    """How a point has learned so far."""

    curve: list[Spot] = field(default_factory=list)
    updates: int = 0
    samples: int = 0
    seconds: float = 0.0
    noise_scale: float | None = None
    """Median over the second half of what the run measured; None if it measured none."""
    noise_curve: list[tuple[float, float]] = field(default_factory=list)
    """Samples, and the noise scale measured then."""
    peak_memory: int | None = None


def read_learning(run_dir: Path, metric: str, smoothing: int, smoothing_samples: int) -> Learning:
    """Reads how far a point's run has come; an empty one if there is nothing yet.

    Args:
        metric: `train/loss` or `eval/…`.
        smoothing: evaluations that are averaged.
        smoothing_samples: samples whose windows' losses are averaged.
    """
    try:
        metrics = read_metrics(run_dir / "metrics.jsonl")
    except OSError:
        return Learning()
    if not metrics.updates:
        return Learning()
    spots = _spots_of_updates(metrics)
    if metric == TRAIN_LOSS:
        curve = _smoothed_over_samples(list(spots.values()), smoothing_samples)
    else:
        name = metric.removeprefix("eval/")
        evaluated = [
            Spot(updates=at.updates, samples=at.samples, seconds=at.seconds, value=value)
            for update, value in metrics.evaluated(name)
            if (at := spots.get(int(update))) is not None
        ]
        curve = _smoothed(evaluated, smoothing)
    last = list(spots.values())[-1]
    noise_curve = [
        (spots[int(update)].samples, value)
        for update, value in metrics.values("noise_scale")
        if math.isfinite(value) and value > 0
    ]
    noise = [value for _, value in noise_curve]
    memory = [value for _, value in metrics.values("peak_memory_bytes") if math.isfinite(value)]
    return Learning(
        curve=curve,
        updates=int(last.updates),
        samples=int(last.samples),
        seconds=last.seconds,
        noise_scale=statistics.median(noise[len(noise) // 2 :]) if noise else None,
        noise_curve=noise_curve,
        peak_memory=int(max(memory)) if memory else None,
    )


def _spots_of_updates(metrics: Metrics) -> dict[int, Spot]:
    spots = {}
    seconds = 0.0
    # The first updates of a process warm things up, each for itself: what they took beyond the usual is left out.
    times = [line.get("update_seconds") for line in metrics.updates]
    usual = statistics.median([float(time) for time in times if isinstance(time, int | float)] or [0.0])
    for line, time in zip(metrics.updates, times, strict=True):
        seconds += min(float(time), 20 * usual) if isinstance(time, int | float) else 0.0
        spots[int(line["update"])] = Spot(
            updates=float(line["update"]),
            samples=float(line.get("samples", 0)),
            seconds=seconds,
            value=_finite_or_nan(line.get("loss")),
        )
    return spots


def _finite_or_nan(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _mean(spots: Sequence[Spot]) -> Spot:
    """The mean of values that are finite, at the mean place of those: so smoothing does not come late."""
    usable = [spot for spot in spots if math.isfinite(spot.value)]
    if not usable:
        last = spots[-1]
        return Spot(updates=last.updates, samples=last.samples, seconds=last.seconds, value=math.nan)
    return Spot(
        updates=statistics.fmean(spot.updates for spot in usable),
        samples=statistics.fmean(spot.samples for spot in usable),
        seconds=statistics.fmean(spot.seconds for spot in usable),
        value=statistics.fmean(spot.value for spot in usable),
    )


def _smoothed(spots: Sequence[Spot], count: int) -> list[Spot]:
    return [_mean(spots[max(0, end - count) : end]) for end in range(1, len(spots) + 1)]


def _smoothed_over_samples(spots: Sequence[Spot], samples: int) -> list[Spot]:
    """Each with those before it that began less than so many samples ago."""
    curve = []
    first = 0
    for end, spot in enumerate(spots, 1):
        while spots[first].samples <= spot.samples - samples and first < end - 1:
            first += 1
        curve.append(_mean(spots[first:end]))
    return curve


def best_value(curve: Sequence[Spot], goal: Goal) -> float | None:
    """The best of a curve; None if it has no finite value."""
    finite = [spot.value for spot in curve if math.isfinite(spot.value)]
    if not finite:
        return None
    return min(finite) if goal is Goal.min else max(finite)


def crossing(curve: Sequence[Spot], target: float, goal: Goal) -> Spot | None:
    """Where a curve first reaches the target, between two places by a straight line; None if it does not."""
    before: Spot | None = None
    for spot in curve:
        if not math.isfinite(spot.value):
            continue
        if spot.value <= target if goal is Goal.min else spot.value >= target:
            if before is None or before.value == spot.value:
                return spot
            share = (target - before.value) / (spot.value - before.value)

            def between(one: float, other: float, share: float = share) -> float:
                return one + share * (other - one)

            return Spot(
                updates=between(before.updates, spot.updates),
                samples=between(before.samples, spot.samples),
                seconds=between(before.seconds, spot.seconds),
                value=target,
            )
        before = spot
    return None
