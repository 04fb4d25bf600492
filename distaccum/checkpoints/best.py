"""The best evaluations of a run, whose checkpoints are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from distaccum.checkpoints.folder import name_of
from distaccum.config import CheckpointConfig
from distaccum.config.enums import Goal, usual_goal
from distaccum.errors import UserError


def goal_of(config: CheckpointConfig) -> Goal:
    """Returns whether less or more of the metric is better."""
    return config.best_goal or usual_goal(config.best_metric)


class BestEvaluations:
    """Remembers the `keep_best` best evaluations so far, by their updates."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config
        self._ranks: dict[int, float] = {}

    def is_among(self, update: int, metrics: Mapping[str, float]) -> bool:
        """Adds an evaluation; returns whether it is one of them.

        Raises:
            UserError: the evaluation doesn't have the metric.
        """
        name, count = self._config.best_metric, self._config.keep_best
        if count == 0:
            return False
        if name not in metrics:
            raise UserError(
                f"checkpoint.best_metric={name} is unknown: the evaluation has {', '.join(sorted(metrics))}. Name one "
                "of those, or set checkpoint.keep_best=0."
            )
        value = metrics[name]
        if value == value:
            self._ranks[update] = value if goal_of(self._config) is Goal.min else -value
        ranking = sorted(self._ranks, key=lambda number: (self._ranks[number], number))
        self._ranks = {number: self._ranks[number] for number in ranking[:count]}
        return update in self._ranks

    @property
    def by(self) -> str:
        """The metric and the goal that they are chosen by."""
        return f"{self._config.best_metric} {goal_of(self._config).name}"

    def drop(self, update: int) -> None:
        """Forgets an evaluation whose checkpoint could not be saved."""
        self._ranks.pop(update, None)

    def state_dict(self) -> dict[str, Any]:
        return {"best": {str(number): value for number, value in self._ranks.items()}, "best_by": self.by.split(" ")}

    def load_state_dict(self, state: Mapping[str, Any], here: Collection[str]) -> str | None:
        """Restores what `state_dict` returned; if it was chosen by another metric or goal, drops it and returns that.

        Args:
            here: names of the checkpoints that are still there.
        """
        best = {int(number): value for number, value in state["best"].items()}
        before = " ".join(state.get("best_by") or [self.by])
        is_same = not best or before == self.by
        self._ranks = {number: value for number, value in best.items() if is_same and name_of(number) in here}
        return None if is_same else before
