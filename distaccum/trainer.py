"""The loop: windows outside, micro-steps inside. A client of the accumulator like any other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.accumulation import Accumulator, UpdateResult
from distaccum.choices import OnNonfinite, PrecisionName
from distaccum.config import LoopConfig
from distaccum.devices import Precision, peak_memory
from distaccum.evaluation import evaluate
from distaccum.loaders import EvaluationLoader, Window, WindowLoader
from distaccum.observers import EarlyStopping, EvaluationRecord, Observer, RunEnd, RunStart, UpdateRecord
from distaccum.optim import Schedule
from distaccum.strategies import Strategy, strategy_of
from distaccum.tasks import TaskOutput

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Totals:
    """What has been done since the start of the run."""

    updates: int = 0
    samples: int = 0
    skipped_updates: int = 0
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    sync_seconds: float = 0.0


class Trainer:
    """Trains a model on windows, evaluates it, and tells observers.

    Everything it uses is open to anybody's own loop: the loader, the accumulator, the task, the schedule.

    Args:
        model: placed already: a plain module in one process, `DistributedDataParallel` in several.
        task: any callable `(model, batch) -> TaskOutput`.
        optimizer: over the model's parameters.
        loader: the windows to train on.
        loop: how long, when to evaluate, clipping.
        schedule: sets the learning rate of each update; None leaves it alone.
        evaluation_loader: what to evaluate on; None for no evaluation.
        references: losses to compare evaluations with, by name.
        precision: the format to compute in; None for the parameters' own.
        scaler: gradient scaler for float16.
        observers: told of what happens on this rank; rank 0 has them all, the others none.
        strategy: how the model is placed. Default: what the model shows.
        run_dir: where the run's files are, for the observers to say.
        config: the configuration, for the observers to keep.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        task: Callable[[nn.Module, Any], TaskOutput],
        optimizer: torch.optim.Optimizer,
        loader: WindowLoader,
        loop: LoopConfig,
        schedule: Schedule | None = None,
        evaluation_loader: EvaluationLoader | None = None,
        references: dict[str, float] | None = None,
        precision: Precision | None = None,
        scaler: torch.amp.GradScaler | None = None,
        observers: Sequence[Observer] = (),
        strategy: Strategy | None = None,
        run_dir: Path | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.loader = loader
        self.loop = loop
        self.schedule = schedule
        self.evaluation_loader = evaluation_loader
        self.references = references or {}
        self.strategy = strategy or strategy_of(model)
        self.precision = precision or Precision(PrecisionName.fp32, self.strategy.device.type)
        self.observers = observers
        self.run_dir = run_dir
        self.config = config or {}
        self.optimizer = optimizer
        self.accumulator = Accumulator(
            model,
            optimizer,
            clip_norm=loop.clip_norm,
            scaler=scaler,
            skip_nonfinite=loop.on_nonfinite is OnNonfinite.skip,
            strategy=self.strategy,
        )
        self.total_updates = total_updates(loop, len(loader))
        self._totals = _Totals()
        self._evaluation: EvaluationRecord | None = None
        stopping = loop.early_stopping
        self._early_stopping = (
            EarlyStopping(stopping.metric, stopping.patience, stopping.goal) if stopping.metric else None
        )

    def fit(self) -> RunEnd:
        """Trains to the end of the run.

        Raises:
            UserError: a sample can't be loaded, a loss is NaN, an observer can't write, …
        """
        with ExitStack() as stack:
            for observer in self.observers:
                stack.callback(observer.close)
            started = time.perf_counter()
            self._tell_start()
            stopped_early = None
            for window in self._windows():
                self._update(window)
                if self._is_evaluation_due(window):
                    stopped_early = self._evaluate(window.epoch)
                    if stopped_early:
                        break
            end = self._end(stopped_early, time.perf_counter() - started)
            for observer in self.observers:
                observer.on_end(end)
        return end

    def _windows(self) -> Iterator[Window]:
        epoch = 0
        while self._totals.updates < self.total_updates:
            for window in self.loader.epoch(epoch):
                yield window
                if self._totals.updates == self.total_updates:
                    return
            epoch += 1

    def _update(self, window: Window) -> None:
        number = self._totals.updates + 1
        lr = self.schedule.apply(number) if self.schedule else float(self.optimizer.param_groups[0]["lr"])
        with self.accumulator.window(window) as micro_batches:
            for batch in micro_batches:
                with self.precision.autocast():
                    output = self.task(self.model, batch)
                self.accumulator.backward(output.loss_sum, output.weight, output.sums)
        self._tell_update(window, self.accumulator.step(), lr)

    def _tell_update(self, window: Window, result: UpdateResult, lr: float) -> None:
        totals = self._totals
        totals.updates += 1
        totals.samples += window.num_samples
        totals.skipped_updates += result.skipped
        totals.train_seconds += result.seconds
        totals.data_seconds += result.data_seconds
        totals.sync_seconds += result.sync_seconds
        if result.skipped:
            logger.info("update %d skipped: loss %g, gradient norm %g", totals.updates, result.loss, result.grad_norm)
        if not self.observers:
            return
        record = UpdateRecord(
            update=totals.updates,
            epoch=window.epoch,
            samples=totals.samples,
            loss=result.loss,
            metrics=self._metrics(result.sums, result.weight),
            grad_norm=result.grad_norm,
            lr=lr,
            micro_steps=result.micro_steps,
            weight=result.weight,
            update_seconds=result.seconds,
            samples_per_second=window.num_samples / result.seconds,
            data_seconds=result.data_seconds,
            sync_seconds=result.sync_seconds,
            sync_calls=result.sync_calls,
            sync_bytes=result.sync_bytes,
            skipped=result.skipped,
        )
        for observer in self.observers:
            observer.on_update(record)

    def _is_evaluation_due(self, window: Window) -> bool:
        if self.evaluation_loader is None:
            return False
        updates = self._totals.updates
        if updates == self.total_updates:
            return True
        if self.loop.eval_every is not None:
            return updates % self.loop.eval_every == 0
        return window.index == len(self.loader) - 1

    def _evaluate(self, epoch: int) -> str | None:
        """Evaluates; returns why to stop now, if early stopping says so. All ranks see the same metrics."""
        assert self.evaluation_loader is not None
        started = time.perf_counter()
        self.strategy.share_buffers()
        loss, weight, sums = evaluate(
            self.strategy.module,
            self.task,
            self.evaluation_loader,
            device=self.strategy.device,
            autocast=self.precision.autocast,
        )
        self._evaluation = EvaluationRecord(
            update=self._totals.updates,
            epoch=epoch,
            metrics={"loss": loss, **self._metrics(sums, weight)},
            references=self.references,
            seconds=time.perf_counter() - started,
        )
        for observer in self.observers:
            observer.on_evaluation(self._evaluation)
        stopping = self._early_stopping
        if stopping is not None and stopping.update(self._evaluation.metrics):
            return stopping.reason
        return None

    def _metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        if not weight:
            return dict.fromkeys(sums, math.nan)
        if hasattr(self.task, "metrics"):
            return dict(self.task.metrics(sums, weight))
        return {name: float(value) / weight for name, value in sums.items()}

    def _tell_start(self) -> None:
        logger.debug("%s", self.loader.explain())
        if self.loop.max_updates is not None and self.total_updates < self.loop.max_updates:
            logger.info(
                "train.epochs=%s ends the run after %d updates, before train.max_updates=%d",
                self.loop.epochs,
                self.total_updates,
                self.loop.max_updates,
            )
        if not self.strategy.module.training:
            logger.warning(
                "the model is in evaluation mode, so it trains without dropout: call train() on it if not meant"
            )
        start = RunStart(
            run_dir=self.run_dir,
            plan=self.loader.explain(),
            total_updates=self.total_updates,
            updates_per_epoch=len(self.loader),
            config=self.config,
        )
        for observer in self.observers:
            observer.on_start(start)

    def _end(self, stopped_early: str | None, total_seconds: float) -> RunEnd:
        totals = self._totals
        # Clocks differ a little, so a share may come out a hair below 0 or above 1.
        data_share = min(1.0, totals.data_seconds / totals.train_seconds)
        sync_share = min(1.0 - data_share, totals.sync_seconds / totals.train_seconds)
        memory, kind = self._largest_peak_memory()
        return RunEnd(
            updates=totals.updates,
            samples=totals.samples,
            skipped_updates=totals.skipped_updates,
            stopped_early=stopped_early,
            evaluation=self._evaluation,
            train_seconds=totals.train_seconds,
            total_seconds=total_seconds,
            samples_per_second=totals.samples / totals.train_seconds,
            data_share=data_share,
            compute_share=1.0 - data_share - sync_share,
            sync_share=sync_share,
            peak_memory_bytes=memory,
            peak_memory_kind=kind,
            run_dir=self.run_dir,
        )

    def _largest_peak_memory(self) -> tuple[int, str]:
        memory, kind = peak_memory(self.strategy.device)
        group = self.strategy.process_group
        if group is None:
            return memory, kind
        largest = torch.tensor(memory, dtype=torch.int64, device=self.strategy.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        return int(largest), f"{kind}, on the rank that used most"


def total_updates(loop: LoopConfig, updates_per_epoch: int) -> int:
    """Number of the run's last update, unless it stops early."""
    limits = [loop.max_updates, loop.epochs * updates_per_epoch if loop.epochs is not None else None]
    return min(limit for limit in limits if limit is not None)
