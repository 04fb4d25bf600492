"""The evaluations of a run: of its weights, and of averages of them beside."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distaccum.checkpoints import random_state, set_random_state
from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader
from distaccum.observers import EvaluationRecord, UpdateRecord
from distaccum.runtime.devices import Precision
from distaccum.runtime.heartbeat import Heartbeat
from distaccum.strategies import Strategy
from distaccum.tasks import Task, TaskOutput, as_number
from distaccum.training.evaluation import evaluate_model
from distaccum.training.grace import EvaluationDroppedError, Grace
from distaccum.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)


class Evaluator:
    """Evaluates a placed model, exactly over all ranks.

    Args:
        task: as the trainer's.
        loader: what to evaluate on.
        references: losses to compare with, by name.
        grace: says whether there is time.
        averages: of the weights, evaluated too as soon as they have begun; their metrics are `ema/loss` and so on.
    """

    def __init__(
        self,
        strategy: Strategy,
        task: Callable[[nn.Module, Any], TaskOutput],
        loader: EvaluationLoader,
        *,
        references: dict[str, float],
        precision: Precision,
        heartbeat: Heartbeat,
        grace: Grace,
        averages: Sequence[WeightAverage] = (),
    ) -> None:
        self._strategy = strategy
        self._task = task
        self._loader = loader
        self._references = references
        self._precision = precision
        self._heartbeat = heartbeat
        self._grace = grace
        self._averages = averages

    def evaluate(self, update: int, epoch: int) -> EvaluationRecord:
        """Evaluates after an update. All ranks call it, and see the same metrics.

        Raises:
            EvaluationDroppedError: a signal has come, and all is as it was before.
        """
        started = time.perf_counter()
        generators = random_state(self._strategy.device)
        try:
            metrics = self._metrics(update)
            for average in self._averages:
                if average.has_begun:
                    with average.in_the_model():
                        found = self._metrics(update)
                    metrics |= {f"{average.name}/{name}": value for name, value in found.items()}
        except EvaluationDroppedError:
            set_random_state(generators, self._strategy.device)
            logger.info("the evaluation after update %d is left for later", update)
            raise
        seconds = time.perf_counter() - started
        return EvaluationRecord(
            update=update, epoch=epoch, metrics=metrics, references=self._references, seconds=seconds
        )

    def to_choose_by(self, metrics: dict[str, float]) -> dict[str, float]:
        """An evaluation's metrics for those who compare evaluations: NaN for averages that have not begun."""
        later = {
            f"{average.name}/{name}": math.nan
            for average in self._averages
            if not average.has_begun
            for name in metrics
        }
        return later | metrics

    def _metrics(self, update: int) -> dict[str, float]:
        self._strategy.share_buffers()
        loss, weight, sums = evaluate_model(
            self._strategy.module,
            self._task,
            self._loader,
            device=self._strategy.device,
            autocast=self._precision.autocast,
            heartbeat=self._heartbeat,
            between=lambda is_over: self._grace.check_evaluation(update, is_over=is_over),
        )
        return {"loss": loss, **metrics_of(self._task, sums, weight)}


def metrics_of(task: Any, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
    """The task's metrics over a window or an evaluation, of its sums.

    Raises:
        UserError: one is no number, or is named as what the run itself records (`loss`, `lr`, …).
    """
    if not weight:
        return dict.fromkeys(sums, math.nan)
    found = task.metrics(sums, weight) if hasattr(task, "metrics") else Task.metrics(task, sums, weight)
    if not isinstance(found, Mapping):
        raise UserError(f"the task's metrics() returned a {type(found).__name__}, not numbers by name.")
    if taken := found.keys() & UpdateRecord.__dataclass_fields__.keys():
        raise UserError(f"the task's metric {min(taken)} would hide the run's own {min(taken)}: give it another name.")
    return {name: as_number(value, f"the task's metric {name}") for name, value in found.items()}
