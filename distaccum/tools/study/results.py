"""The results of a study: its runs, the target that they were to reach, and what follows."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from distaccum.config.enums import Goal
from distaccum.tools.bench.environment import Circumstances
from distaccum.tools.study.curves import Learning, Spot, best_value, crossing
from distaccum.tools.study.fit import Fit, Measured, fit
from distaccum.tools.study.points import Point

REACHED, LIMIT, DIVERGED, FAILED, MISSING = "reached", "limit", "diverged", "failed", "missing"


@dataclass(kw_only=True, slots=True)
class Result(Learning):
    """One run, and how far it got."""

    name: str
    title: str
    batch_size: int
    rules: list[str]
    lr: float
    outcome: str
    """`reached` the target; came to its `limit` without; `diverged`; `failed`; or `missing`: not run yet."""
    reason: str = ""
    best: float | None = None
    """Best smoothed value of the metric."""
    reached: Spot | None = None
    """Where it reached the target."""
    is_chosen: bool = False
    """Of the runs of its batch size, it reached the target in fewest updates."""


@dataclass(kw_only=True, slots=True)
class Study(Circumstances):
    """The content of `study.json`."""

    num_samples: int
    """Of the training data."""
    max_samples: int
    metric: str
    goal: str
    target: float | None
    is_target_chosen: bool
    """The target follows from the runs; none was configured."""
    results: list[Result]
    fit: Fit | None = None
    noise_scale: float | None = None
    """Median over the chosen runs."""
    advice: list[str] = field(default_factory=list)
    recommended: str | None = None
    """Name of the run whose batch size is the one to use."""

    @property
    def chosen(self) -> list[Result]:
        """The best run of each batch size that reached the target, from small to large."""
        return [result for result in self.results if result.is_chosen]

    @property
    def is_complete(self) -> bool:
        return all(result.outcome != MISSING for result in self.results)


def result_of(point: Point, learning: Learning, *, is_over: bool, reason: str = "", diverged: bool = False) -> Result:
    """Returns a point's result, before there is a target."""
    outcome = DIVERGED if diverged else FAILED if reason else LIMIT if is_over else MISSING
    return Result(
        name=point.name,
        title=point.title,
        batch_size=point.batch_size,
        rules=[rule.name for rule in point.rules],
        lr=point.lr,
        outcome=outcome,
        reason=reason,
        **{entry.name: getattr(learning, entry.name) for entry in dataclasses.fields(Learning)},
    )


def chosen_target(results: Sequence[Result], goal: Goal) -> float | None:
    """Returns the hardest target that every batch size has reached, the worst of their bests; None if there is none."""
    best: dict[int, float] = {}
    for result in results:
        value = best_value(result.curve, goal)
        if value is None or result.outcome != LIMIT:
            continue
        size = result.batch_size
        better = min if goal is Goal.min else max
        best[size] = better(value, best.get(size, value))
    if not best:
        return None
    return max(best.values()) if goal is Goal.min else min(best.values())


def conclude(study: Study) -> None:
    """Finds where runs reached the target, chooses the best of each batch size, and fits what they took."""
    goal = Goal[study.goal]
    for result in study.results:
        result.best = best_value(result.curve, goal)
        # What diverged later is nothing to recommend, and what is not over has no best yet.
        is_sound = result.outcome in (LIMIT, REACHED)
        target = study.target if is_sound else None
        result.reached = None if target is None else crossing(result.curve, target, goal)
        if result.reached is not None:
            result.outcome = REACHED
    by_size: dict[int, Result] = {}
    for result in study.results:
        result.is_chosen = False
        other = by_size.get(result.batch_size)
        if result.reached is None:
            continue
        if other is None or other.reached is None or result.reached.updates < other.reached.updates:
            by_size[result.batch_size] = result
    for result in by_size.values():
        result.is_chosen = True
    study.fit = fit([measured(result) for result in study.chosen])
    noise = [result.noise_scale for result in study.chosen if result.noise_scale is not None]
    study.noise_scale = statistics.median(noise) if noise else None


def measured(result: Result) -> Measured:
    """Returns the updates and samples that a run took to the target."""
    spot = result.reached
    assert spot is not None
    updates = max(spot.updates, 1e-9)
    # A value between two evaluations of a run may lie before its first update's end.
    return Measured(
        batch_size=spot.samples / updates if spot.samples else math.nan, updates=updates, samples=spot.samples
    )
