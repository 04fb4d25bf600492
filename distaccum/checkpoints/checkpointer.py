"""Saves a run beside the training, and restores it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from distaccum.checkpoints.best import BestEvaluations
from distaccum.checkpoints.folder import Checkpoint, checkpoints_in, clear_leftovers, prune
from distaccum.checkpoints.frozen import fingerprints, frozen_parameters
from distaccum.checkpoints.memory import MemoryCheckpoints
from distaccum.checkpoints.memory_place import Gather, forget_memory, memory_place
from distaccum.checkpoints.newest import newest_anywhere
from distaccum.checkpoints.optimizer_state import (
    check_optimizer,
    group_settings,
)
from distaccum.checkpoints.restoring import Stateful, restore_into
from distaccum.checkpoints.staging import Staging
from distaccum.checkpoints.state import (
    extra_states,
    of_python,
    reasons,
    state_tensors,
    write_tensors,
)
from distaccum.checkpoints.storage import ManifestWriter, check_formats
from distaccum.config import CheckpointConfig
from distaccum.runtime.diagnosis import is_broken_collective
from distaccum.runtime.nested import gather_objects
from distaccum.strategies import Strategy, strategy_of
from distaccum.strategies.optimizers import own_optimizer

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves a run at the boundaries between updates and restores it, on as many ranks or on others.

    In anybody's own loop:

        checkpointer = Checkpointer(Path("run/checkpoints"), model, optimizer)
        accumulator = Accumulator(model, optimizer, strategy=checkpointer.strategy, flags=checkpointer.flags)
        checkpointer.states["accumulator"] = accumulator
        …
            update = accumulator.step()
            if checkpointer.is_due(accumulator.updates, update.flags):
                checkpointer.save(accumulator.updates, {"epoch": window.epoch, "next_window": window.index + 1})

    All ranks call all methods alike, and must see the same folder.

    Args:
        folder: of the run's checkpoints.
        model: placed already, as for `Accumulator`.
        optimizer: over its parameters.
        config: how often, how many, how.
        strategy: how the model is placed. Default: what the model shows.
        states: further objects whose state belongs to the run (scaler, early stopping, …), by name.
        tensors: further tensors that belong to it, by kind and name: an average of the weights, for instance, as
            `{"ema": averaged.state_dict()}`. They are the live ones: saved as they are then, and restored in place.
        timeout_seconds: how long ranks wait for each other while one writes.
        files: other files of the run that belong to it (`metrics.jsonl`). A checkpoint counts once they are on the
            disk.

    Attributes:
        flags: flags for the `Accumulator`, by which ranks agree on when to save.
        states, tensors: as given; more may be added. `own`: the same, of this rank alone; see `read_own`.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        config: CheckpointConfig | None = None,
        strategy: Strategy | None = None,
        states: Mapping[str, Stateful] | None = None,
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
        timeout_seconds: float = 600.0,
        files: Sequence[Path] = (),
    ) -> None:
        self.folder = Path(folder)
        self.config = config or CheckpointConfig()
        self.optimizer = optimizer
        self.strategy = strategy_of(model, strategy)
        self.states = dict(states or {})
        self.tensors = dict(tensors or {})
        self.files, self.own = files, dict[str, Tensor]()
        self.flags: dict[str, Callable[[], bool]] = {
            "save": self._is_time_up,
            "saving": self.is_busy,
            "lost touch": lambda: self.has_lost_touch,
        }
        self.rank = dist.get_rank() if self.strategy.process_group is not None else 0
        self._timeout_seconds = timeout_seconds
        self._group = self._new_group()
        self._gather: Gather = lambda value: gather_objects(value, self._group)
        self._memory = self._kept_in_memory()
        self._constant_settings: dict[tuple[int, str], Any] = {}
        self._settings_at_start = group_settings(optimizer, self._constant_settings)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._saved_at = time.monotonic()
        self._is_owed = self._is_checked = False
        self._is_due_on_disk = self._is_due_in_memory = self._is_best = False
        self._best = BestEvaluations(self.config)
        self.has_lost_touch = False
        """True when a rank has waited for another one's disk in vain, so that nothing can be saved for now."""
        self.last_saved: int | None = None
        """Update of the newest checkpoint that is whole on the disk, as far as this object has seen."""
        check_optimizer(optimizer)
        self._check()
        self._frozen_at_start = self._frozen(self._group)

    def _check(self) -> None:
        """Refuses what can't be saved as it is now."""
        check_formats({**self.strategy.module.state_dict(keep_vars=True), **self._tensors()})
        self._state({})

    def _frozen(self, group: dist.ProcessGroup | None) -> dict[str, dict[str, Any]]:
        """Returns format, shape and fingerprint of frozen parameters, by name, if those need not be saved."""
        if not self.config.trainable_only:
            return {}
        self.strategy.at_rest()
        return fingerprints(frozen_parameters(self.strategy.module, self.optimizer), group)

    def _kept_in_memory(self) -> MemoryCheckpoints | None:
        if self.config.memory_every_updates is None:
            return None
        return MemoryCheckpoints(self.folder, self.rank, self._new_group(), self.files)

    def _new_group(self) -> dist.ProcessGroup | None:
        """A group for checkpoints alone, as their collectives run in a thread beside the training's."""
        if self.strategy.process_group is None:
            return None
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_seconds))
        return group

    # When

    def is_busy(self) -> bool:
        """True while an earlier checkpoint is still being written on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def _is_time_up(self) -> bool:
        # Clocks of ranks differ: rank 0's counts.
        minutes = self.config.every_minutes
        return self.rank == 0 and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def is_due(self, update: int, flags: frozenset[str] = frozenset()) -> bool:
        """Whether a checkpoint is to be saved after this update; the same on all ranks.

        One that falls due while the one before it is still being written waits for a later update: training never
        waits for the disk.

        Args:
            flags: `UpdateResult.flags` of the update.
        """
        if "lost touch" in flags:
            self._meet_again()
        if not self._is_checked:
            self._check()  # by now the optimizer has its state
            self._is_checked = True
        self.wait_for_memory()
        every, in_memory = self.config.every_updates, self.config.memory_every_updates
        self._is_due_in_memory |= in_memory is not None and update % in_memory == 0
        self._is_owed |= "save" in flags or (every is not None and update % every == 0)
        if self._is_owed and "saving" in flags:
            logger.debug("update %d: the checkpoint before is still being written, so the next one waits", update)
        else:
            self._is_due_on_disk |= self._is_owed
        return self._is_due_on_disk or self._is_due_in_memory

    def _meet_again(self) -> None:
        """Replaces the group, which can't be used any more once a rank has waited in it for too long."""
        self._wait_for_disk()
        self.has_lost_touch = False
        self._group = self._new_group()
        if self.rank == 0:
            logger.warning(
                "a checkpoint could not be saved: ranks have waited longer for each other's disks than "
                "distributed.timeout_seconds=%g. Training goes on, and the next one is tried.",
                self._timeout_seconds,
            )

    def is_among_best(self, update: int, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is one of the `keep_best` best so far, so that its state is to be saved.

        Raises:
            UserError: the evaluation doesn't have the metric.
        """
        self._is_best = self._best.is_among(update, metrics)
        return self._is_best

    # Saving

    def save(self, update: int, progress: dict[str, Any], *, wait: bool = False) -> None:
        """Saves the state after an update: where `is_due` has found that it is due, else on the disk.

        Returns as soon as the state has been copied in memory, unless `wait` or `async_save=false`. A disk that is full
        or read-only doesn't end the training: it is logged, and the checkpoints there are stay as they are.

        Args:
            progress: where the run stands, as JSON values; `restore` returns it.
            wait: return when it is on the disk.
        """
        # A state in memory that counts a best checkpoint must not be whole before that one.
        wait |= self._is_best and self._memory is not None
        if wait or self._is_best or self._is_due_on_disk or not self._is_due_in_memory:
            self._save_to_disk(update, progress, wait=wait)
        if self._memory is not None and self._is_due_in_memory:
            self._memory.wait()
            self._memory.save(update, *self._content(progress, self._memory.group))
        self._is_due_on_disk = self._is_due_in_memory = self._is_best = False

    def _save_to_disk(self, update: int, progress: dict[str, Any], *, wait: bool) -> None:
        self._wait_for_disk()
        self._is_owed = False
        self._saved_at = time.monotonic()
        try:
            tensors, state = self._content(progress, self._group)
        except RuntimeError as error:  # a rank was waited for in vain
            self._report_failure(update, error)
            return
        if wait or not self.config.async_save:
            self._write(update, tensors, state)
            return
        state = json.loads(json.dumps(state))  # what is alive goes on changing
        self._thread = threading.Thread(
            target=self._write, args=(update, self._staging.copied(tensors), state), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _content(
        self, progress: dict[str, Any], group: dist.ProcessGroup | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what is saved: tensors, which are the live ones, and all else."""
        tensors, state = self._tensors(), self._state(progress)
        # What has changed since the start is not what a restart begins with, and saved as any other.
        state["frozen"] = {
            name: entry for name, entry in self._frozen(group).items() if self._frozen_at_start.get(name) == entry
        }
        for name in state["frozen"]:
            del tensors[f"model/{name}"]
        return tensors, state

    def _tensors(self) -> dict[str, Tensor]:
        return state_tensors(self.strategy, self.optimizer, self.rank, self.tensors, self.own)

    def _state(self, progress: dict[str, Any]) -> dict[str, Any]:
        """Returns what is saved besides tensors, as JSON values."""
        return {
            "progress": progress,
            "states": {
                name: of_python(entry.state_dict(), f"the state of {name}", "Put large tensors into tensors=")
                for name, entry in self.states.items()
            },
            "optimizer": {
                "name": type(own_optimizer(self.optimizer)).__name__,
                "settings": group_settings(self.optimizer, self._constant_settings),
                "settings_at_start": self._settings_at_start,
            },
            "extra": extra_states(self.strategy.module),
            "world_size": self.strategy.world_size,
            **self._best.state_dict(),
        }

    def wait(self, timeout: float | None = None) -> None:
        """Waits until nothing is being written any more."""
        if self._memory is not None:
            self._memory.join(timeout)
        self._wait_for_disk(timeout)

    def _wait_for_disk(self, timeout: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self._thread = None

    def wait_for_memory(self) -> None:
        """Waits until the last state in memory is whole on all nodes; `is_due` does so too.

        To be called before an update shows anywhere but in memory: then a crash loses no more updates that have been
        seen than `memory_every_updates`.

        Raises:
            UserError: there is no room for states in memory.
        """
        if self._memory is not None:
            self._memory.wait()

    @property
    def is_busy_in_memory(self) -> bool:
        """Whether `wait_for_memory` would wait."""
        return self._memory is not None and self._memory.is_busy

    def clear_memory(self) -> None:
        """Removes the run's states from the memory of all nodes, as it is over, or is on the disk."""
        self.wait()
        if self.rank == 0:
            with suppress(OSError):
                forget_memory(self.folder)
        memory_place(self.folder, rank=self.rank, gather=self._gather).clear_others()

    def _write(self, update: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        writer = ManifestWriter(self.folder, update, self.rank, state, self.files)
        try:
            write_tensors(writer, tensors, self._group)
        except (Exception, CheckpointException) as error:  # whatever it is, training goes on
            self._report_failure(update, error)
            return
        self.last_saved = update
        if self.rank == 0:
            logger.debug("checkpoint of update %d saved", update)
            try:
                best = map(int, state["best"])
                prune(self.folder, keep_last=self.config.keep_last, newest=update, best=best)
            except OSError as error:
                logger.warning("old checkpoints in %s can't be removed: %s", self.folder, error.strerror or error)

    def _report_failure(self, update: int, error: BaseException) -> None:
        logger.debug("the checkpoint of update %d failed", update, exc_info=error)
        self._best.drop(update)
        if is_broken_collective(error):
            self.has_lost_touch = True
            return  # if a rank has died, that ends the run, and is reported there
        if self.rank != 0:
            return
        with suppress(OSError):
            clear_leftovers(self.folder)
        kept = "there is none yet" if self.last_saved is None else f"that of update {self.last_saved} is kept"
        logger.warning(
            "the checkpoint of update %d could not be saved: %s. Training goes on; %s.", update, reasons(error), kept
        )

    # Restoring

    def restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Restores model, optimizer, generators and `states` in place; returns the `progress` that was saved.

        With as many ranks as saved it, generators and all that belongs to one rank are restored too, bit for bit. With
        another number, generators stay as they are, and buffers are rank 0's.

        Raises:
            UserError: the checkpoint holds another model or another optimizer, or leaves out other frozen weights.
        """
        restore_into(
            checkpoint,
            self.strategy,
            self.optimizer,
            rank=self.rank,
            group=self._group,
            also=self.tensors,
            states=self.states,
            settings_at_start=self._settings_at_start,
        )
        # Those of a run in another folder are not here to be kept.
        here = {path.name for path in checkpoints_in(self.folder)}
        if (before := self._best.load_state_dict(checkpoint.state, here)) is not None and self.rank == 0:
            logger.info(
                "the best checkpoints were chosen by %s, and are from here on by %s: the choice begins anew",
                before,
                self._best.by,
            )
        if self._memory is not None:
            self._memory.goes_on_from(checkpoint)
        self.last_saved = None if checkpoint.is_in_memory else checkpoint.update
        progress: dict[str, Any] = checkpoint.state["progress"]
        return progress

    def newest(self) -> Checkpoint | None:
        """The newest whole state, in the folder or in memory; damaged ones are named in the log and passed over."""
        if self.rank == 0:
            clear_leftovers(self.folder)
        return newest_anywhere(self.folder, rank=self.rank, gather=self._gather)
