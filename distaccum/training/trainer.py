"""The loop: windows outside, micro-steps inside. A client of the accumulator like any other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.accumulation import Accumulator
from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.accumulation.recovery import Recovery
from distaccum.accumulation.result import UpdateResult
from distaccum.checkpoints import Checkpoint, Checkpointer, Stateful, export_model
from distaccum.config import LoopConfig
from distaccum.config.enums import LrRule, OnNonfinite, PrecisionName
from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader, Window, WindowLoader
from distaccum.observers import EarlyStopping, Observer, RunEnd, RunStart
from distaccum.runtime.compilation import CompileClock
from distaccum.runtime.devices import Precision
from distaccum.runtime.heartbeat import Heartbeat
from distaccum.runtime.randomness import derived_seed, seed_everything
from distaccum.runtime.stop_signals import Interruption
from distaccum.strategies import Strategy, strategy_of
from distaccum.tasks import TaskOutput
from distaccum.training.adapt_cuts import CutTuning
from distaccum.training.evaluation import Evaluator, metrics_of
from distaccum.training.grace import EvaluationDroppedError, Grace, WindowDroppedError
from distaccum.training.memory_line import MemoryLine
from distaccum.training.model import remarks
from distaccum.training.optim import LR_POWERS, Schedule
from distaccum.training.progress import COMPILED, RunProgress
from distaccum.training.update import Updater
from distaccum.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

LIMIT_REPORT = "largest micro-batch"
"""Report of the accumulator: what micro-batches of a rank have come down to because memory ran out; 0 if it didn't."""

_SECONDS_FOR_A_SAVE_UNDER_WAY = 10.0


class Trainer:
    """Trains a model on windows, evaluates it, and tells observers.

    Everything it uses is open to anybody's own loop: the loader, the accumulator, the task, the schedule.

    Args:
        model: placed already: a plain module in one process, `DistributedDataParallel` in several.
        task: any callable `(model, batch) -> TaskOutput`; a `CoupledTask` for a loss that couples a window's samples.
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
        config: the configuration, for the observers and checkpoints to keep.
        checkpointer: saves the run; None for no checkpoints.
        interruption: tells when the run is to stop; None if it never is.
        heartbeat: told what this rank is doing, for the other ranks to know if it hangs.
        measure_costs: fit what micro-batches cost, if windows are cut by length.
        balance_speed: give ranks shares of each window in proportion to their measured speed.
        compile_clock: counts what the updates spend compiling; None if nothing is compiled.
        recovery: go on with smaller micro-batches when memory runs out. None: that ends the run.
        noise_scale: measures how noisy gradients are; None: nobody does.
        lr_rule: how the learning rate follows the size of windows, if the loader has a schedule for it.
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
        checkpointer: Checkpointer | None = None,
        interruption: Interruption | None = None,
        heartbeat: Heartbeat | None = None,
        measure_costs: bool = True,
        balance_speed: bool = False,
        compile_clock: CompileClock | None = None,
        recovery: Recovery | None = None,
        noise_scale: NoiseScale | None = None,
        lr_rule: LrRule = LrRule.none,
    ) -> None:
        self.model = model
        self.task = task
        self.loader = loader
        self.loop = loop
        self.schedule = schedule
        self.evaluation_loader = evaluation_loader
        self.strategy = strategy_of(model, strategy)
        self.precision = precision or Precision(PrecisionName.fp32, self.strategy.device.type)
        self.observers = observers
        self.run_dir = run_dir
        self.config = config or {}
        self.optimizer = optimizer
        self.checkpointer = checkpointer
        self.interruption = interruption or Interruption()
        self.heartbeat = heartbeat or Heartbeat(0, 1)
        self._compile_clock = compile_clock
        grace_seconds = checkpointer.config.grace_seconds if checkpointer else math.inf
        self._grace = Grace(self.interruption, self.strategy, grace_seconds)
        self._averages = [WeightAverage(self.strategy, config) for config in loop.averages]
        self._evaluator: Evaluator | None = None
        if evaluation_loader is not None:
            self._evaluator = Evaluator(
                strategy=self.strategy,
                task=task,
                loader=evaluation_loader,
                references=references or {},
                precision=self.precision,
                heartbeat=self.heartbeat,
                grace=self._grace,
                averages=self._averages,
            )
        self._tuning = CutTuning(
            loader, self.strategy, measure_costs=measure_costs, balance_speed=balance_speed, noise_scale=noise_scale
        )
        self.accumulator = self._new_accumulator(scaler, recovery, noise_scale)
        self._memory_line = MemoryLine(self.strategy, optimizer, self._averages, is_compiled=compile_clock is not None)
        self._updater = Updater(
            model=model,
            task=task,
            accumulator=self.accumulator,
            precision=self.precision,
            schedule=schedule,
            interruption=self.interruption,
            grace=self._grace,
            heartbeat=self.heartbeat,
            memory_line=self._memory_line,
            compile_clock=compile_clock,
        )
        self._lr_power = LR_POWERS[lr_rule]
        self._progress = RunProgress(loader, loop)
        stopping = loop.early_stopping
        self._early_stopping = (
            EarlyStopping(stopping.metric, stopping.patience, stopping.goal) if stopping.metric else None
        )
        self._is_ahead_of_save = False
        self._register_states(scaler)

    def _new_accumulator(
        self, scaler: torch.amp.GradScaler | None, recovery: Recovery | None, noise_scale: NoiseScale | None
    ) -> Accumulator:
        limit = {LIMIT_REPORT: lambda: float(self.loader.limit or 0)} if recovery is not None else {}
        return Accumulator(
            self.model,
            self.optimizer,
            clip_norm=self.loop.clip_norm,
            scaler=scaler,
            skip_nonfinite=self.loop.on_nonfinite is OnNonfinite.skip,
            strategy=self.strategy,
            flags={
                "stop": self.interruption.is_requested,
                "long": self._grace.is_long,
                **(self.checkpointer.flags if self.checkpointer else {}),
                **({COMPILED: self._compile_clock.has_news} if self._compile_clock else {}),
            },
            reports=self._tuning.reports | limit,
            time_micro_steps=self._tuning.needs_times,
            recovery=recovery,
            noise_scale=noise_scale,
        )

    def _register_states(self, scaler: torch.amp.GradScaler | None) -> None:
        """Tells the checkpointer what belongs to the run besides model, optimizer and generators."""
        if self.checkpointer is None:
            return
        stateful: dict[str, Stateful | None] = {
            "loader": self.loader,
            "accumulator": self.accumulator,
            "scaler": scaler,
            # Of another metric, it would be of no use.
            f"early_stopping/{self.loop.early_stopping.metric}": self._early_stopping,
        }
        self.checkpointer.states |= {name: entry for name, entry in stateful.items() if entry is not None}
        self.checkpointer.tensors |= {average.name: average.tensors() for average in self._averages}

    @property
    def total_updates(self) -> int:
        """Number of the run's last update, unless it stops early. Sizes that follow the noise scale change it."""
        return self._progress.total_updates

    def fit(self) -> RunEnd:
        """Trains to the end of the run, or to a signal to stop.

        Raises:
            UserError: a sample can't be loaded, a loss is NaN, an observer can't write, …
        """
        with ExitStack() as stack:
            for observer in self.observers:
                stack.callback(observer.close)
            for loader in (self.loader, self.evaluation_loader):
                if loader is not None:
                    stack.callback(loader.close)
            if self._compile_clock is not None:
                stack.enter_context(self._compile_clock.listening())
            if self.checkpointer is not None:
                # What ends the run with an error should not cost the checkpoint that is being written.
                stack.callback(self.checkpointer.wait, _SECONDS_FOR_A_SAVE_UNDER_WAY)
            self._progress.begin()
            self._tell_start()
            try:
                interrupted = self._train()
            except (WindowDroppedError, EvaluationDroppedError):
                interrupted = self._grace.agreed_signal()
            self._save_at_the_end(is_finished=interrupted is None)
            end = self._progress.end(
                self.strategy,
                stopped_early=self._stopped_early(),
                interrupted=interrupted,
                is_saved=self.checkpointer is not None and self.checkpointer.last_saved == self._progress.updates,
                run_dir=self.run_dir,
            )
            for observer in self.observers:
                observer.on_end(end)
        return end

    def _train(self) -> str | None:
        """Updates, evaluations and checkpoints, in this order; returns the signal that ended it, if one did."""
        if self._progress.owes_evaluation:
            self._evaluate()
        if self._stopped_early() is not None:
            return None
        for window in self._progress.windows():
            result = self._update(window)
            self._progress.next_window += 1
            self._progress.owes_evaluation = self._evaluator is not None and self._progress.is_evaluation_due(window)
            if "stop" in result.flags:
                # An evaluation may take longer than the time that is left: the resumed run makes up for it.
                return self._grace.agreed_signal()
            is_best = self._progress.owes_evaluation and self._evaluate()
            if self._stopped_early() is not None:
                return None
            if self.checkpointer and (self.checkpointer.is_due(self._progress.updates, result.flags) or is_best):
                self._save()
        return None

    def _stopped_early(self) -> str | None:
        """Why the run is over before its last update; None if it isn't."""
        stopping = self._early_stopping
        return stopping.reason if stopping is not None and stopping.is_over else None

    def _update(self, window: Window) -> UpdateResult:
        number = self._progress.updates + 1
        factor = self.loader.sizes.ratio(window.epoch, window.index) ** self._lr_power if self._lr_power else 1.0
        result, lr = self._updater.update(number, window, factor)
        if LIMIT_REPORT in result.reports:
            self.loader.limits = tuple(int(size) or None for size in result.reports[LIMIT_REPORT])
        if not result.skipped:
            for average in self._averages:
                average.after_update(number)
        self._tell_update(window, result, lr)
        self._memory_line.tell()
        self._tuning.after_update(self._progress.updates, window, result)
        self.accumulator.time_micro_steps = self._tuning.needs_times
        return result

    def _tell_update(self, window: Window, result: UpdateResult, lr: float) -> None:
        compile_seconds = self._compile_clock.take() if self._compile_clock is not None else 0.0
        self._progress.totals.add(window, result, compile_seconds)
        self._is_ahead_of_save = True
        if result.skipped:
            number = self._progress.updates
            logger.info("update %d skipped: loss %g, gradient norm %g", number, result.loss, result.grad_norm)
        if not self.observers:
            return
        metrics = metrics_of(self.task, result.sums, result.weight)
        record = self._progress.totals.record(window, result, metrics, lr, self.strategy.device, compile_seconds)
        for observer in self.observers:
            observer.on_update(record)

    def _evaluate(self) -> bool:
        """Evaluates; returns whether it is one of the best so far, to be saved. All ranks see the same metrics."""
        assert self._evaluator is not None
        evaluation = self._evaluator.evaluate(self._progress.updates, self._progress.epoch)
        for observer in self.observers:
            observer.on_evaluation(evaluation)
        self._progress.evaluation, self._progress.owes_evaluation = evaluation, False
        self._is_ahead_of_save = True
        stopping = self._early_stopping
        metrics = self._evaluator.to_choose_by(evaluation.metrics)
        # An evaluation that an average has no part in yet is no reason to lose patience with it.
        has_begun = stopping is None or stopping.metric in evaluation.metrics or stopping.metric not in metrics
        if stopping is not None and has_begun:
            stopping.update(metrics)
        return self.checkpointer is not None and self.checkpointer.is_among_best(self._progress.updates, metrics)

    # Saving and going on

    def restore(self, checkpoint: Checkpoint, *, override: bool = False) -> None:
        """Goes on from a checkpoint, with exactly the window after it. To be called before `fit`.

        Args:
            override: go on although the windows are no longer the same ones, at the first window that begins where
                the run had come to, or later.

        Raises:
            UserError: global batch, seed or length of the training data are others, or the model or optimizer is.
        """
        assert self.checkpointer is not None, "a trainer without checkpoints has nothing to go on from"
        self._progress.go_on_from(checkpoint, override=override)
        if self._progress.updates:
            self.strategy.warm_up(self._loss_of_next_window)
        self.checkpointer.restore(checkpoint)
        for average in self._averages:
            average.goes_on_from(checkpoint.update)
        if checkpoint.state["world_size"] != self.strategy.world_size:
            # Not the numbers again that the run has drawn at its start.
            seed_everything(derived_seed(self.loader.seed, "rank", self.checkpointer.rank, checkpoint.update))
        self.accumulator.clear_gradients()
        self._progress.owes_evaluation &= self.evaluation_loader is not None

    def _loss_of_next_window(self) -> Tensor:
        batch = self._progress.sample_micro_batch()
        with self.precision.autocast():
            return self.task(self.model, batch).loss_sum

    def _save(self, *, wait: bool = False) -> None:
        assert self.checkpointer is not None
        state = self._progress.state_dict() | {"config": self.config}
        self.checkpointer.save(self._progress.updates, state, wait=wait)
        self._is_ahead_of_save = False

    def _save_at_the_end(self, *, is_finished: bool) -> None:
        if self.checkpointer is None:
            return
        self.heartbeat.doing("saving of the last checkpoint", update=self._progress.updates)
        self.checkpointer.wait()
        if self._is_ahead_of_save or self.checkpointer.last_saved != self._progress.updates:
            self._save(wait=True)
        if self.checkpointer.has_lost_touch and self.checkpointer.rank == 0:
            logger.warning(
                "the state after update %d could not be saved: ranks have waited longer for each other's disks than "
                "distributed.timeout_seconds",
                self._progress.updates,
            )
        if is_finished and self.run_dir is not None:
            is_main = self.checkpointer.rank == 0
            export_model(self.strategy, self.run_dir, is_main=is_main)
            for average in self._averages:
                if average.has_begun:
                    with average.in_the_model():
                        export_model(self.strategy, self.run_dir, is_main=is_main, name=f"model-{average.name}")

    # What observers are told

    def _tell_start(self) -> None:
        logger.debug("%s", self.loader.explain())
        last = self._progress.total_updates
        for average in self._averages:
            first = average.config.first_update or 1
            if first > last and not self._progress.follows_noise:
                raise UserError(
                    f"train.{average.name}.first_update={first} comes after the run's last update, "
                    f"{last}: there would be nothing to average. Set a lower one, or train for longer."
                )
        for remark in remarks(self.strategy.module, is_cut=not self.loader.plan.is_one_shot):
            logger.info("%s", remark)
        start = RunStart(
            run_dir=self.run_dir,
            plan=self.loader.explain(),
            total_updates=last,
            updates_per_epoch=self.loader.sizes.count(0) if self.loader.sizes.is_constant else None,
            config=self.config,
            resumed_update=self._progress.updates,
            skipped_updates=self._progress.totals.skipped_updates,
        )
        for observer in self.observers:
            observer.on_start(start)
