"""Studies by hand: results as runs would leave them."""

from __future__ import annotations

from typing import Any

from distaccum.config.enums import Goal, LrRule
from distaccum.tools.study.advice import advise
from distaccum.tools.study.curves import Learning, Spot
from distaccum.tools.study.points import Point
from distaccum.tools.study.results import Study, chosen_target, conclude, result_of

CONFIG: dict[str, Any] = {
    "batch": {"global_batch_size": 64, "micro_batch_size": None},
    "train": {"ema": {"decay": None}, "swa": {"first_update": None}},
    "data": {"train": {"_target_": "distaccum.data.Digits"}},
    "model": {"_target_": "distaccum.models.CNN"},
    "optim": {"_target_": "torch.optim.AdamW", "lr": 0.002},
    "schedule": {"name": "constant"},
    "study": {"ranks": 1, "smoothing": 3, "lr_rules": ["linear", "sqrt"]},
}


def learning(
    size: int, *, min_updates: float, critical: float, noise: float | None = None, to: float = 0.1, slower: float = 1
) -> Learning:
    """A run that gets from 1 to 0.1 in as many updates as the two numbers say, or not further than to `to`."""
    updates = min_updates * (1 + critical / size) * slower
    places = [index / 20 for index in range(21)]
    curve = [
        Spot(updates=place * updates, samples=place * updates * size, seconds=place * updates * size / 1e3, value=value)
        for place in places
        if (value := 10 ** (-place)) >= to * 0.999
    ]
    last = curve[-1]
    return Learning(
        curve=curve,
        updates=round(last.updates),
        samples=round(last.samples),
        seconds=last.seconds,
        noise_scale=noise,
        noise_curve=[(100.0 * size, noise)] * 2 if noise else [],
        peak_memory=2**20,
    )


def point(size: int, *rules: str) -> Point:
    return Point(batch_size=size, rules=tuple(LrRule[name] for name in rules or ("linear",)), lr=0.002 * size / 64)


def study(*entries: tuple[Point, Learning], target: float | None = 0.1, **changes: Any) -> Study:
    results = [result_of(of, how, is_over=bool(how.updates)) for of, how in entries]
    made = Study(
        date="2026-01-01T10:00:00",
        command="python -m distaccum.study",
        machine="a machine",
        versions={"torch": "2"},
        config=CONFIG,
        num_samples=1000,
        max_samples=10_000,
        metric="eval/loss",
        goal="min",
        target=chosen_target(results, Goal.min) if target is None else target,
        is_target_chosen=target is None,
        results=results,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    conclude(made)
    made.advice = advise(made, ["optim.lr=0.5", "experiment=mine", "study.point=3", "run_dir=x"])
    return made
