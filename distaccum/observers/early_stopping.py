"""Decides when to stop because the evaluations no longer get better."""

from __future__ import annotations

import math

from distaccum.config.enums import Goal, usual_goal
from distaccum.errors import UserError
from distaccum.observers.formatting import number, words


class EarlyStopping:
    """Counts evaluations without an improvement of one metric. Pure arithmetic: every rank may keep its own.

    Attributes:
        goal: Whether less or more is better.
        best: Best value so far, or None before the first finite one.
        best_evaluation: Number of the evaluation it came from, from 1; 0 before the first.
        evaluations: Evaluations seen.

    Example:
        >>> stopping = EarlyStopping("loss", patience=2)
        >>> [stopping.update({"loss": loss}) for loss in (0.5, 0.4, 0.4, 0.6)]
        [False, False, False, True]
    """

    def __init__(self, metric: str, patience: int, goal: Goal | None = None) -> None:
        """`goal` None: less is better for a `loss`, more for everything else."""
        self.metric = metric
        self.patience = patience
        self.goal = goal or usual_goal(metric)
        self.best: float | None = None
        self.best_evaluation = 0
        self.evaluations = 0

    def update(self, metrics: dict[str, float]) -> bool:
        """Takes the metrics of the next evaluation; True when it is time to stop.

        A tie is no improvement, and neither is a NaN or an infinity.

        Raises:
            UserError: The evaluation has no such metric.
        """
        if self.metric not in metrics:
            raise UserError(
                f"train.early_stopping.metric={self.metric} is unknown: the evaluation has "
                f"{', '.join(sorted(metrics))}. Name one of those, or set train.early_stopping.metric=null."
            )
        self.evaluations += 1
        value = float(metrics[self.metric])  # a task's own may be NumPy's, which JSON knows nothing of
        is_better = self.best is None or (value < self.best if self.goal is Goal.min else value > self.best)
        if is_better and math.isfinite(value):
            self.best = value
            self.best_evaluation = self.evaluations
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether it is time to stop."""
        return self.evaluations - self.best_evaluation >= self.patience

    @property
    def reason(self) -> str:
        """The reason why the run stops, in words."""
        count = f"{self.patience} evaluation{'s' if self.patience > 1 else ''}"
        if self.best is None:
            return f"{words(self.metric)} was not finite in {count}"
        return f"{words(self.metric)} has not improved on {number(self.best)} for {count}"

    def state_dict(self) -> dict[str, float | int | None]:
        """Returns the state with which a resumed run stops where an unbroken one would."""
        return {"best": self.best, "best_evaluation": self.best_evaluation, "evaluations": self.evaluations}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Goes on from `state_dict()`'s answer."""
        self.best = state["best"]
        self.best_evaluation = int(state["best_evaluation"] or 0)
        self.evaluations = int(state["evaluations"] or 0)
