"""Counts what a run has done, and saves and restores it: totals, the next window, the last evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from distaccum.accumulation.result import UpdateResult
from distaccum.checkpoints import Checkpoint, putting_back
from distaccum.checkpoints.form import Form, is_dict, is_natural, is_number, is_text, misfit
from distaccum.config import LoopConfig, TrainConfig
from distaccum.config.enums import BatchSchedule
from distaccum.errors import UserError
from distaccum.loaders import Window, WindowLoader
from distaccum.observers import EvaluationRecord, RunEnd
from distaccum.planning.window_sizes import BatchSizes, NoiseSizes
from distaccum.runtime.memory import peak_memory
from distaccum.runtime.nested import gather_objects
from distaccum.strategies import Strategy

logger = logging.getLogger(__name__)

COMPILED = "compiled"
"""The accumulator's flag of a rank that compiles, for which the others wait."""


@dataclass(slots=True)
class Totals:
    """Totals since the start of the run, over all its restarts."""

    updates: int = 0
    samples: int = 0
    skipped_updates: int = 0
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    sync_seconds: float = 0.0
    warm_up_updates: int = 0
    """Updates in which a rank compiled. They are not in the shares, nor in the samples per second."""
    warm_up_samples: int = 0
    warm_up_seconds: float = 0.0
    compile_seconds: float = 0.0
    """Part of the warm-up that was spent compiling, on this rank."""

    def add(self, window: Window, result: UpdateResult, compile_seconds: float = 0.0) -> None:
        """Counts one more update.

        Args:
            compile_seconds: part of it spent compiling on this rank.
        """
        self.updates += 1
        self.samples += window.num_samples
        self.skipped_updates += result.skipped
        self.train_seconds += result.seconds
        if compile_seconds or COMPILED in result.flags:
            self.warm_up_updates += 1
            self.warm_up_samples += window.num_samples
            self.warm_up_seconds += result.seconds
            self.compile_seconds += compile_seconds
            return
        self.data_seconds += result.data_seconds
        self.sync_seconds += result.sync_seconds

    def samples_per_second(self) -> float:
        """Returns samples per second without the warm-up, unless there was nothing else."""
        samples, seconds = self.samples - self.warm_up_samples, self.train_seconds - self.warm_up_seconds
        return samples / seconds if samples else self.samples / (self.train_seconds or 1.0)

    def shares(self) -> tuple[float, float, float]:
        """Returns the shares of the time in updates that went into data, computing and sync; they add up to 1."""
        seconds = self.train_seconds - self.warm_up_seconds or 1.0
        # Clocks differ a little, so a share may come out a hair below 0 or above 1.
        data = min(1.0, self.data_seconds / seconds)
        sync = min(1.0 - data, self.sync_seconds / seconds)
        return data, 1.0 - data - sync, sync


def _largest_peak_memory(strategy: Strategy) -> tuple[int, str]:
    """Returns the bytes at the highest point on the rank that used most, and what they measure, in words."""
    memory, kind = max(gather_objects(peak_memory(strategy.device), strategy.process_group))
    return memory, kind if strategy.process_group is None else f"{kind}, on the rank that used most"


def is_micro_steps(value: Any) -> bool:
    """Whether a checkpoint says how many micro-steps of its next window each rank has done."""
    return isinstance(value, list) and all(is_natural(entry) and entry > 0 for entry in value)


_EVALUATION: Form = {
    "update": is_natural,
    "epoch": is_natural,
    "metrics": {str: is_number},
    "sample": lambda value: value is None or is_text(value),
    "seconds": is_number,
}
_PROGRESS: Form = {
    "totals": lambda value: (
        is_dict(value) and value.keys() <= asdict(Totals()).keys() and misfit(value, {str: is_number}) is None
    ),
    "total_seconds": is_number,
    "epoch": is_natural,
    "next_window": is_natural,
    "position": lambda value: value is None or is_natural(value),
    "owes_evaluation": lambda value: isinstance(value, bool),
    "evaluation": lambda value: value is None or misfit(value, _EVALUATION) is None,
    "unfinished": lambda value: value is None or is_micro_steps(value),
    "windows": {
        "batch.global_batch_size": is_natural,
        "batch.drop_last": lambda value: isinstance(value, bool),
        "seed": lambda value: isinstance(value, int),
        "training samples": is_natural,
    },
    "config": is_dict,
}
"""The form of `progress` in a trainer's checkpoint."""


def check_progress(checkpoint: Checkpoint, mend: str) -> None:
    """Refuses a checkpoint that no trainer has saved.

    Raises:
        UserError: names the entry that is missing or of another form.
    """
    progress = checkpoint.state["progress"]
    where = misfit(progress, _PROGRESS)
    if where is None and progress["totals"].get("updates") != checkpoint.update:
        where = ".totals.updates"
    if where is not None:
        raise UserError(
            f"{checkpoint.path} was not saved by distaccum.train, which writes {where.removeprefix('.')} in "
            f"another form. {mend}"
        )


class RunProgress:
    """Counts what a run has done, and goes through the windows that are left.

    Args:
        loader: of the windows.
        loop: length of the run.

    Attributes:
        totals: of the updates so far.
        epoch: of the next window; one that is over stays the current one until the next window has been begun.
        next_window: its number in the epoch.
        owes_evaluation: whether an evaluation has been due since the last window, and is not done.
        evaluation: the last one.
        done: this rank's micro-steps of the next window that were made before the run was started again.
    """

    def __init__(self, loader: WindowLoader, loop: LoopConfig) -> None:
        self._loader = loader
        self._loop = loop
        self.totals = Totals()
        self.epoch, self.next_window = 0, 0
        self.owes_evaluation = False
        self.done = 0
        self.evaluation: EvaluationRecord | None = None
        self._ahead = 0
        """See `updates_ahead`."""
        self._seconds_before, self._started = 0.0, time.perf_counter()

    def begin(self) -> None:
        """Starts the clock: what was before is not in the run's seconds."""
        self._started = time.perf_counter()
        most, last = self._loop.max_updates, self.total_updates
        if most is not None and last < most and not self.follows_noise:
            logger.info(
                "train.epochs=%s ends the run after %d updates, before train.max_updates=%d",
                self._loop.epochs,
                last,
                most,
            )

    @property
    def total_seconds(self) -> float:
        """Seconds that the run has taken so far, over all its restarts."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def updates(self) -> int:
        """Number of the last update that was made, from 1; 0 if there was none."""
        return self.totals.updates

    @property
    def total_updates(self) -> int:
        """Number of the run's last update, unless it stops early. Sizes that follow the noise scale change it."""
        return total_updates(self._loop, self._loader.sizes, self._ahead)

    @property
    def follows_noise(self) -> bool:
        """Whether the sizes of windows follow the noise scale and the number of updates is not known in advance."""
        return isinstance(self._loader.sizes.rule, NoiseSizes)

    def is_evaluation_due(self, window: Window) -> bool:
        """Whether a run with evaluations has one after this window."""
        if self.updates == self.total_updates:
            return True
        if self._loop.eval_every is not None:
            return self.updates % self._loop.eval_every == 0
        return window.index == self._loader.sizes.count(window.epoch) - 1

    def windows(self) -> Iterator[Window]:
        """Yields the windows from the next one to the run's last, while `totals` count them."""
        while self.updates < self.total_updates:
            for window in self._loader.epoch(self.epoch, self.next_window, self.done):
                self.epoch, self.next_window, self.done = window.epoch, window.index, 0
                yield window
                if self.updates == self.total_updates:
                    return
            self.epoch, self.next_window = self.epoch + 1, 0

    def sample_micro_batch(self) -> Any:
        """Loads a micro-batch of the next window, which stays the next one."""
        is_over = self.next_window >= self._loader.sizes.count(self.epoch)
        return self._loader.sample_micro_batch(*((self.epoch + 1, 0) if is_over else (self.epoch, self.next_window)))

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for `go_on_from`, for JSON. The sizes of windows are in the loader's own."""
        done = self._loader.sizes.bounds(self.epoch)[self.next_window - 1][1] if self.next_window else 0
        return {
            "totals": asdict(self.totals),
            "total_seconds": self.total_seconds,
            "epoch": self.epoch,
            "next_window": self.next_window,
            "position": done,
            "owes_evaluation": self.owes_evaluation,
            "evaluation": asdict(self.evaluation) if self.evaluation else None,
            "windows": _windows_identity(self._loader),
        }

    def end(self, strategy: Strategy, **how: Any) -> RunEnd:
        """Returns the record of the run's end. All ranks call it.

        Args:
            how: the fields of `RunEnd` that say why it ended, whether it is saved, and where.
        """
        data, compute, sync = self.totals.shares()
        memory, kind = _largest_peak_memory(strategy)
        totals = asdict(self.totals)
        return RunEnd(
            **{entry.name: totals[entry.name] for entry in fields(RunEnd) if entry.name in totals},
            evaluation=self.evaluation,
            total_seconds=self.total_seconds,
            samples_per_second=self.totals.samples_per_second(),
            data_share=data,
            compute_share=compute,
            sync_share=sync,
            peak_memory_bytes=memory,
            peak_memory_kind=kind,
            **how,
        )

    def go_on_from(self, checkpoint: Checkpoint, *, override: bool) -> None:
        """Restores the state of a checkpoint, and the sizes of the loader's windows.

        Args:
            override: go on although the windows are no longer the same ones.

        Raises:
            UserError: they are not, and there is no override.
        """
        progress = checkpoint.state["progress"]
        # The next window depends on them.
        with putting_back(checkpoint, "loader"):
            self._loader.load_places(checkpoint.states.get("loader", {}))
        if different := _different_windows(progress["windows"], self._loader):
            if not override:
                raise UserError(
                    f"{checkpoint.path} was saved with {different}: the windows would no longer be the same. Put it "
                    "back as it was, or set resume_override=true to go on from there all the same, or begin anew in "
                    "another run_dir."
                )
            logger.warning("resume_override: saved with %s", different)
        self.epoch = progress["epoch"]
        self.next_window = _next_window(progress, self._loader)
        self._ahead = updates_ahead(progress, self._loader)
        with putting_back(checkpoint, "progress"):
            self.totals = Totals(**progress["totals"])
            self.evaluation = EvaluationRecord(**progress["evaluation"]) if progress["evaluation"] else None
        self._seconds_before = progress["total_seconds"]
        self.owes_evaluation = progress["owes_evaluation"]


def total_updates(loop: LoopConfig, sizes: BatchSizes, ahead: int = 0) -> int:
    """Returns the number of the run's last update, unless it stops early or sizes that follow the noise scale change.

    Args:
        ahead: see `updates_ahead`.
    """
    limits = [loop.max_updates, sizes.first_number(loop.epochs) + ahead if loop.epochs is not None else None]
    return min(limit for limit in limits if limit is not None)


def updates_ahead(progress: dict[str, Any], loader: WindowLoader) -> int:
    """Returns how many more updates a run has made than there are windows before its next one.

    That is 0, unless its windows have become others on the way.
    """
    made: int = progress["totals"]["updates"]
    return made - loader.sizes.number(progress["epoch"], _next_window(progress, loader))


def _windows_identity(loader: WindowLoader) -> dict[str, Any]:
    """Returns all that the samples of a window depend on."""
    identity = {
        "batch.global_batch_size": loader.plan.global_batch_size,
        "batch.schedule": str(loader.sizes.rule),
        "batch.drop_last": loader.sizes.drop_last,
        "seed": loader.seed,
        "training samples": loader.num_samples,
    }
    if hasattr(loader.dataset, "samples_of_epoch") and hasattr(loader.dataset, "order"):
        identity["training data"] = loader.dataset.order
    return identity


def _different_windows(before: dict[str, Any], loader: WindowLoader) -> str:
    """Describes how `_windows_identity` has changed; empty if it has not."""
    now = _windows_identity(loader)
    before = {"batch.schedule": "constant", **before}
    return ", ".join(f"{key}={before.get(key)} and now has {now[key]}" for key in now if before.get(key) != now[key])


def _next_window(progress: dict[str, Any], loader: WindowLoader) -> int:
    """Returns the number in its epoch of the window that a run goes on with.

    Where the windows are others by now, that is the first which begins where the run had come to, or later.
    """
    index: int = progress["next_window"]
    if not _different_windows(progress["windows"], loader):
        return index
    done = progress.get("position", index * progress["windows"]["batch.global_batch_size"])
    return loader.sizes.bounds(progress["epoch"]).starting_before(done)


def scheduled_updates(config: TrainConfig, loader: WindowLoader, checkpoint: Checkpoint | None) -> int:
    """Returns the number of updates that the learning rate's schedule is laid out for."""
    follows_noise = config.batch.schedule is BatchSchedule.noise
    if follows_noise and config.train.max_updates is not None:
        return config.train.max_updates  # how many an epoch will have is not known
    ahead = updates_ahead(checkpoint.state["progress"], loader) if checkpoint is not None and not follows_noise else 0
    return total_updates(config.train, loader.sizes, ahead)
