"""The loop of a run: updates, evaluations and checkpoints, in this order. `training.build` assembles its parts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distaccum.accumulation.result import UpdateResult
from distaccum.checkpoints import Checkpoint, Checkpointer
from distaccum.config import LoopConfig
from distaccum.errors import UserError
from distaccum.loaders import Window, WindowLoader
from distaccum.observers import EarlyStopping, Observer, RunEnd, RunStart, UpdateRecord
from distaccum.planning.batch_plan import ONE_SYNC
from distaccum.runtime.memory import peak_memory
from distaccum.runtime.randomness import derived_seed, seed_everything
from distaccum.training.adapt_cuts import CutTuning
from distaccum.training.data_waits import DataWaits
from distaccum.training.evaluated_weights import evaluated_weights
from distaccum.training.evaluation import Evaluator, metrics_of
from distaccum.training.export import export_trained
from distaccum.training.model import remarks
from distaccum.training.observers import show_model
from distaccum.training.progress import RunProgress
from distaccum.training.supervision import DroppedError
from distaccum.training.unfinished import KIND, agreed, to_go_on_with
from distaccum.training.unfreezing import Unfreezing
from distaccum.training.update import Updater
from distaccum.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

_SECONDS_FOR_A_SAVE_UNDER_WAY = 10.0
_UPDATES_BETWEEN_MEMORY = 100


@dataclass(kw_only=True, eq=False)
class Trainer:
    """Trains a model on windows, evaluates and saves it, and reports to observers.

    Everything it uses is open to anybody's own loop: the loader, the accumulator, the task, the schedule.

    Attributes:
        updater: makes the update of a window.
        loader: the windows to train on.
        loop: how long to train and when to evaluate.
        tuning: adapts how windows are cut; None leaves that alone.
        waits: says when ranks wait for data; its reports are the accumulator's.
        evaluator: None for no evaluations.
        early_stopping: ends the run when evaluations no longer get better.
        averages: of the weights, taken after each update.
        unfreezing: unfreezes parameters on the way; None if there is nothing to unfreeze.
        checkpointer: saves the run; None for no checkpoints. What belongs to the run besides model, optimizer and
            generators is added to its `states` and `tensors`.
        observers: get what happens on this rank; rank 0 has them all, the others none.
        model_observers: those that use the model (`on_model`); every rank has them.
        run_dir: folder of the run's files.
        beside_weights: what is saved with the trained model, by its `save_pretrained(folder)`: the configuration of a
            model of transformers, a tokenizer. What has no such method is passed over.
        config: the configuration, for the observers and checkpoints to keep.
    """

    updater: Updater
    loader: WindowLoader
    loop: LoopConfig
    tuning: CutTuning | None = None
    waits: DataWaits | None = None
    evaluator: Evaluator | None = None
    early_stopping: EarlyStopping | None = None
    averages: Sequence[WeightAverage] = ()
    unfreezing: Unfreezing | None = None
    checkpointer: Checkpointer | None = None
    observers: Sequence[Observer] = ()
    model_observers: Sequence[Observer] = ()
    run_dir: Path | None = None
    beside_weights: Sequence[Any] = ()
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.accumulator = self.updater.accumulator
        self.strategy = self.accumulator.strategy
        self._progress = RunProgress(self.loader, self.loop)
        self._is_ahead_of_save = False
        self._unfinished: list[int] | None = None
        if self.checkpointer is not None:
            self._register_states(self.checkpointer)

    def _register_states(self, checkpointer: Checkpointer) -> None:
        checkpointer.states |= {"loader": self.loader, "accumulator": self.accumulator}
        if self.accumulator.scaler is not None:
            checkpointer.states["scaler"] = self.accumulator.scaler
        if self.early_stopping is not None:
            # The state of another metric would be of no use.
            checkpointer.states[f"early_stopping/{self.early_stopping.metric}"] = self.early_stopping
        checkpointer.tensors |= {average.name: average.tensors() for average in self.averages}

    @property
    def total_updates(self) -> int:
        """Number of the run's last update, unless it stops early. Sizes that follow the noise scale change it."""
        return self._progress.total_updates

    def fit(self) -> RunEnd:
        """Trains to the end of the run, or to a signal to stop (see `training.supervision`).

        Raises:
            UserError: a sample can't be loaded, a loss is NaN, an observer can't write, …
        """
        with ExitStack() as stack:
            for observer in self.observers or self.model_observers:
                stack.callback(observer.close)
            stack.callback(self.loader.close)
            if self.evaluator is not None:
                stack.callback(self.evaluator.loader.close)
            if self.updater.compile_clock is not None:
                stack.enter_context(self.updater.compile_clock.listening())
            if self.checkpointer is not None:
                # What ends the run with an error should not cost the checkpoint that is being written.
                stack.callback(self.checkpointer.wait, _SECONDS_FOR_A_SAVE_UNDER_WAY)
            self._progress.begin()
            self._report_start()
            try:
                interrupted = self._train()
            except DroppedError:
                interrupted = self.updater.supervision.agreed_signal()
                if self.updater.unfinished is not None:
                    self._unfinished = agreed(self._progress.updates + 1, self.updater.unfinished, self.strategy)
            self._save_at_the_end(is_finished=interrupted is None)
            if self.checkpointer is not None and self.checkpointer.last_saved == self._progress.updates:
                self.checkpointer.clear_memory()
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
        """Makes updates, evaluations and checkpoints; returns the signal that ended it, if one did."""
        if self._progress.owes_evaluation:
            self._evaluate()
        if self._stopped_early() is not None:
            return None
        for window in self._progress.windows():
            result = self._update(window)
            self._progress.next_window += 1
            self._progress.owes_evaluation = self.evaluator is not None and self._progress.is_evaluation_due(window)
            if "stop" in result.flags:
                # An evaluation may take longer than the time that is left: the resumed run makes up for it.
                return self.updater.supervision.agreed_signal()
            is_best = self._progress.owes_evaluation and self._evaluate()
            if self._stopped_early() is not None:
                return None
            if self.checkpointer and (self.checkpointer.is_due(self._progress.updates, result.flags) or is_best):
                self._save()
        return None

    def _stopped_early(self) -> str | None:
        """Returns why the run is over before its last update; None if it isn't."""
        stopping = self.early_stopping
        return stopping.reason if stopping is not None and stopping.is_over else None

    def _update(self, window: Window) -> UpdateResult:
        number = self._progress.updates + 1
        if self.unfreezing is not None and self.unfreezing.is_due(number):
            self.unfreezing.go_to(number)
            self.updater.memory_line.measure_again()
        result, lr = self.updater.update(number, window, self.loader.sizes.ratio(window.epoch, window.index))
        if self.waits is not None:
            self.waits.after_update(result)
        if self.averages and not result.skipped:
            with evaluated_weights(self.strategy, self.accumulator.optimizer):
                for average in self.averages:
                    average.after_update(number)
        self._wait_for_state_in_memory(number)
        self._report_update(window, result, lr)
        self.updater.memory_line.log_once()
        if self.tuning is not None:
            self.tuning.after_update(number, window, result)
            self.accumulator.time_micro_steps = self.tuning.needs_times
        return result

    def _wait_for_state_in_memory(self, update: int) -> None:
        """Waits, before an update is reported, until the last state in memory is whole."""
        if self.checkpointer is None:
            return
        if self.checkpointer.is_busy_in_memory:
            self.updater.supervision.heartbeat.doing("writing of the state in memory", update=update, waits=True)
        self.checkpointer.wait_for_memory()

    def _report_update(self, window: Window, result: UpdateResult, lr: float) -> None:
        compile_seconds = self.updater.compile_clock.take() if self.updater.compile_clock is not None else 0.0
        self._progress.totals.add(window, result, compile_seconds)
        self._is_ahead_of_save = True
        if result.skipped:
            number = self._progress.updates
            logger.info("update %d skipped: loss %g, gradient norm %g", number, result.loss, result.grad_norm)
        if not self.observers:
            return
        totals = self._progress.totals
        # The peak hardly moves after the first updates, and asking for it takes a tenth of a millisecond.
        has_memory = totals.updates & (totals.updates - 1) == 0 or totals.updates % _UPDATES_BETWEEN_MEMORY == 0
        record = UpdateRecord(
            result=result,
            update=totals.updates,
            epoch=window.epoch,
            samples=totals.samples,
            window_samples=window.num_samples,
            metrics=metrics_of(self.updater.task, result.sums, result.weight),
            lr=lr,
            layers=self.updater.layers,
            group_lrs=self.updater.schedule.rates(),
            compile_seconds=compile_seconds,
            data_wait=self.waits.share if self.waits is not None else 0.0,
            peak_memory_bytes=peak_memory(self.strategy.device)[0] if has_memory else None,
        )
        for observer in self.observers:
            observer.on_update(record)

    def _evaluate(self) -> bool:
        """Evaluates; returns whether it is one of the best so far, to be saved. All ranks see the same metrics."""
        assert self.evaluator is not None
        with evaluated_weights(self.strategy, self.accumulator.optimizer):
            evaluation = self.evaluator.evaluate(self._progress.updates, self._progress.epoch)
            for observer in self.observers:
                observer.on_evaluation(evaluation)
            self.updater.supervision.heartbeat.doing("observers of the model", update=evaluation.update)
            show_model(self.model_observers, self.strategy, self.updater.precision, evaluation, self.loader.seed)
        self._progress.evaluation, self._progress.owes_evaluation = evaluation, False
        self._is_ahead_of_save = True
        stopping = self.early_stopping
        metrics = self.evaluator.to_choose_by(evaluation.metrics)
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
        if self.unfreezing is not None:
            self.unfreezing.go_to(self._progress.updates + 1)
        is_new = self.unfreezing is not None and self.unfreezing.is_due(self._progress.updates + 1)
        if self._progress.updates and not is_new:  # else the unbroken run too has had no backward since the change
            self.strategy.warm_up(self._loss_of_next_window)
        self.checkpointer.restore(checkpoint)
        for average in self.averages:
            average.goes_on_from(checkpoint.update)
        if checkpoint.state["world_size"] != self.strategy.world_size:
            # Not the numbers again that the run has drawn at its start.
            seed_everything(derived_seed(self.loader.seed, "rank", self.checkpointer.rank, checkpoint.update))
        self.accumulator.clear_gradients()
        self._progress.owes_evaluation &= self.evaluator is not None
        self._go_on_in_window(checkpoint)

    def _go_on_in_window(self, checkpoint: Checkpoint) -> None:
        """Goes on in the middle of the next window, if the run was stopped there and the window is still the same."""
        if not checkpoint.state["progress"].get("unfinished"):
            return
        assert self.checkpointer is not None
        epoch, index, cuts = self._progress.epoch, self._progress.next_window, self.loader.cuts
        pieces = [cuts.micro_batches(epoch, index, limit) for limit in (None, cuts.limit)]
        state = to_go_on_with(checkpoint, self.strategy, self.checkpointer.rank, pieces, self.config)
        if state:
            self.accumulator.unfinished, self._progress.done = state, len(state["sizes"])

    def _loss_of_next_window(self) -> Tensor:
        return self.updater.loss(self._progress.sample_micro_batch())

    def _save(self, *, wait: bool = False, unfinished: bool = True) -> None:
        assert self.checkpointer is not None
        state = self._progress.state_dict() | {"config": self.config}
        state["unfinished"] = self._unfinished if unfinished else None
        self.checkpointer.save(self._progress.updates, state, wait=wait)
        self._is_ahead_of_save = False

    def _save_at_the_end(self, *, is_finished: bool) -> None:
        if self.checkpointer is None:
            return
        self.updater.supervision.heartbeat.doing("saving of the last checkpoint", update=self._progress.updates)
        self.checkpointer.wait()
        if self._unfinished:
            if self.checkpointer.last_saved != self._progress.updates:
                # First what is smaller: a kill during the write of gradients then costs the window alone.
                self._save(wait=True, unfinished=False)
            own = self.updater.unfinished or {}
            self.checkpointer.own = {f"{KIND}/{name}": value for name, value in own.items()}
        if self._unfinished or self._is_ahead_of_save or self.checkpointer.last_saved != self._progress.updates:
            self._save(wait=True)
        if self.checkpointer.has_lost_touch and self.checkpointer.rank == 0:
            logger.warning(
                "the state after update %d could not be saved: ranks have waited longer for each other's disks than "
                "distributed.timeout_seconds",
                self._progress.updates,
            )
        if is_finished and self.run_dir is not None:
            is_main = self.checkpointer.rank == 0
            with evaluated_weights(self.strategy, self.accumulator.optimizer):
                export_trained(self.strategy, self.run_dir, is_main=is_main)
            for part in self.beside_weights if is_main else ():
                if hasattr(part, "save_pretrained"):
                    part.save_pretrained(self.run_dir)
            for average in self.averages:
                if average.has_begun:
                    with average.in_the_model():
                        export_trained(self.strategy, self.run_dir, is_main=is_main, suffix=f"-{average.name}")

    # Reporting to observers

    def _report_start(self) -> None:
        logger.debug("%s", self.loader.explain())
        last = self._progress.total_updates
        for average in self.averages:
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
            plan=self.loader.explain().replace(ONE_SYNC, self.strategy.syncs),
            total_updates=last,
            updates_per_epoch=self.loader.sizes.count(0) if self.loader.sizes.is_constant else None,
            config=self.config,
            subject=f"{_class_of(self.strategy.module)} on {type(self.loader.dataset).__name__}",
            resumed_update=self._progress.updates,
            skipped_updates=self._progress.totals.skipped_updates,
        )
        for observer in self.observers:
            observer.on_start(start)


def _class_of(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")  # fully_shard has put it there
