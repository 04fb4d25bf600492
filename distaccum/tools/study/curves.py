"""Reads from a run's `metrics.jsonl` how it has learned: smoothed curves, and where they reach a target."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distaccum.config.enums import Goal
from distaccum.observers.metrics_reading import Metrics, number_or_nan, read_metrics

TRAIN_LOSS = "train/loss"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """A place on a run's curve."""

    updates: float
    samples: float
    seconds: float
    """In updates, evaluations left out."""
    value: float
    """The target's metric, smoothed."""


@dataclass(kw_only=True, slots=True)
class Learning:
    """The curve of a run so far."""

    curve: list[Spot] = field(default_factory=list)
    updates: int = 0
    samples: int = 0
    seconds: float = 0.0
    noise_scale: float | None = None
    """Median over the second half of the measurements; None if there are none."""
    noise_curve: list[tuple[float, float]] = field(default_factory=list)
    """Pairs of samples and the noise scale measured then."""
    peak_memory: int | None = None


def read_learning(run_dir: Path, metric: str, smoothing: int, smoothing_samples: int) -> Learning:
    """Reads how far a run has come; returns an empty `Learning` if it has no update yet.

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
        evaluated = metrics.evaluated(metric.removeprefix("eval/"))
        there = [dataclasses.replace(spots[int(at)], value=value) for at, value in evaluated if int(at) in spots]
        curve = [_mean(there[max(0, end - smoothing) : end]) for end in range(1, len(there) + 1)]
    last = list(spots.values())[-1]
    noise_curve = [
        (spots[int(update)].samples, value)
        for update, value in metrics.values("noise_scale")
        if math.isfinite(value) and value > 0
    ]
    noise = [value for _, value in noise_curve]
    memory = metrics.finite("peak_memory_bytes")
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
    times = metrics.finite("update_seconds")
    longest = 20 * statistics.median(times) if times else 0.0
    for line in metrics.updates:
        time = number_or_nan(line.get("update_seconds"))
        seconds += min(time, longest) if math.isfinite(time) else 0.0
        spots[int(line["update"])] = Spot(
            updates=float(line["update"]),
            samples=float(line.get("samples", 0)),
            seconds=seconds,
            value=number_or_nan(line.get("loss")),
        )
    return spots


def _mean(spots: Sequence[Spot]) -> Spot:
    """The mean of the finite values, at their mean place, so that smoothing does not come late; else the last spot."""
    usable = [spot for spot in spots if math.isfinite(spot.value)]
    if not usable:
        return spots[-1]
    return Spot(
        updates=statistics.fmean(spot.updates for spot in usable),
        samples=statistics.fmean(spot.samples for spot in usable),
        seconds=statistics.fmean(spot.seconds for spot in usable),
        value=statistics.fmean(spot.value for spot in usable),
    )


def _smoothed_over_samples(spots: Sequence[Spot], samples: int) -> list[Spot]:
    """Averages each spot with those before it that began less than so many samples ago."""
    curve = []
    first = 0
    for end, spot in enumerate(spots, 1):
        while spots[first].samples <= spot.samples - samples and first < end - 1:
            first += 1
        curve.append(_mean(spots[first:end]))
    return curve


def best_value(curve: Sequence[Spot], goal: Goal) -> float | None:
    """The best value of a curve; None if none is finite."""
    finite = [spot.value for spot in curve if math.isfinite(spot.value)]
    if not finite:
        return None
    return min(finite) if goal is Goal.min else max(finite)


def crossing(curve: Sequence[Spot], target: float, goal: Goal) -> Spot | None:
    """Returns where a curve first reaches the target, by a straight line between two spots; None if it does not."""
    before: Spot | None = None
    for spot in curve:
        if not math.isfinite(spot.value):
            continue
        if spot.value <= target if goal is Goal.min else spot.value >= target:
            if before is None or before.value == spot.value:
                return spot
            share = (target - before.value) / (spot.value - before.value)
            return Spot(
                updates=before.updates + share * (spot.updates - before.updates),
                samples=before.samples + share * (spot.samples - before.samples),
                seconds=before.seconds + share * (spot.seconds - before.seconds),
                value=target,
            )
        before = spot
    return None
