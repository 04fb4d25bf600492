"""Runs a training from its configuration: folder, checkpoint, trainer, in the order in which errors are cheapest."""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distaccum.checkpoints import Checkpoint, checked, checkpoints_in, newest_anywhere, newest_whole
from distaccum.checkpoints.best import goal_of
from distaccum.config import CheckpointConfig, TrainConfig, as_plain, flat
from distaccum.config.enums import Goal
from distaccum.config.redaction import hide, redacted
from distaccum.errors import UserError
from distaccum.observers import RunEnd
from distaccum.observers.metrics_reading import read_metrics
from distaccum.observers.run_file import record_failure
from distaccum.runtime.devices import resolve_device
from distaccum.runtime.files import without_tilde
from distaccum.runtime.logs import logging_to
from distaccum.runtime.stop_signals import Interruption
from distaccum.runtime.world import World, joined_world
from distaccum.training.build import build_trainer
from distaccum.training.progress import check_progress
from distaccum.training.run_folder import (
    CHECKPOINTS,
    METRICS,
    RunFolder,
    begin,
    changes,
    held_run_folder,
    leave_marker,
    refuse_links,
    results_of_another,
)

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> RunEnd:
    """Runs a training from its configuration, in the ranks that the launcher has started.

    Raises:
        UserError: the configuration, the data or the machine keeps the run from going on.
    """
    with joined_world() as world, ExitStack() as stack:
        device = resolve_device(config.device, world.local_rank)
        world.init_process_group(device, config.distributed.timeout_seconds)
        plain = as_plain(config)
        hide(plain)
        check_same_config(world, plain)
        with world.together():
            made = stack.enter_context(held_run_folder(config.run_dir, config.resume, plain)) if world.is_main else None
        folder = world.from_main(made)
        assert folder is not None
        with world.together(), logging_to(folder.path, world.rank):
            pass  # every rank can write its log, or all stop here
        interruption = Interruption(world)
        with logging_to(folder.path, world.rank), interruption.listening():
            world.heartbeat.log_to(folder.path / "logs" / f"rank{world.rank}.log")
            checkpoint = find_checkpoint(config, folder, world)
            trainer = build_trainer(config, world, device, folder, plain, checkpoint, interruption)
            if checkpoint is not None:
                trainer.restore(checkpoint, override=config.resume_override)
            with world.together():
                if world.is_main and folder.is_restart:
                    begin(folder, plain)
            try:
                end = trainer.fit()
            except Exception as error:
                if world.is_main:
                    record_failure(folder.path, error)
                raise
            if end.interrupted is not None and world.is_main:
                leave_marker(folder.path, end.updates, end.interrupted)
            return end


def best_evaluation(run_dir: Path, config: CheckpointConfig) -> float | None:
    """Returns the best of a run's evaluations by `checkpoint.best_metric`; NaN if none is a number, None without any.

    Raises:
        UserError: the evaluations don't have the metric.
    """
    evaluations = read_metrics(run_dir / METRICS)
    if not evaluations.evaluations:
        return None
    name = config.best_metric
    values = [value for _, value in evaluations.evaluated(name)]
    if not values:
        raise UserError(
            f"checkpoint.best_metric={name} is unknown: the evaluations have "
            f"{', '.join(evaluations.evaluation_metrics())}. Name one of those."
        )
    best = min if goal_of(config) is Goal.min else max
    return best((value for value in values if not math.isnan(value)), default=math.nan)


def check_same_config(world: World, plain: dict[str, Any]) -> None:
    """Refuses ranks that were started with different configurations.

    Raises:
        UserError: names the keys that differ and each rank's value.
    """
    everyone = world.gather(flat(plain))
    keys = sorted(set().union(*everyone))
    # As text, because NaN is not equal to itself.
    different = [key for key in keys if len({repr(flat.get(key)) for flat in everyone}) > 1]
    if different:
        shown = "; ".join(
            f"{key} is "
            + ", ".join(
                f"{redacted(flat.get(key), key.rpartition('.')[2])!r} on rank {rank}"
                for rank, flat in enumerate(everyone)
            )
            for key in different[:5]
        )
        more = f"; and {len(different) - 5} more keys" if len(different) > 5 else ""
        raise UserError(f"the ranks were started with different configurations: {shown}{more}. Give all the same.")


def find_checkpoint(config: TrainConfig, folder: RunFolder, world: World) -> Checkpoint | None:
    """Finds the checkpoint that the run goes on from, and checks it; None for a run that begins anew.

    Raises:
        UserError: `resume` names one that is not there or is damaged; the folder has another run's results.
    """
    checkpoint = newest_anywhere(folder.path / CHECKPOINTS, rank=world.rank, gather=world.gather)
    has_checkpoints = world.from_main(bool(checkpoints_in(folder.path / CHECKPOINTS)))
    if checkpoint is None and folder.is_restart and not has_checkpoints:
        # Its states in memory may have gone with the machine.
        other = world.from_main(results_of_another(folder.path, as_plain(config)) if world.is_main else None)
        if other is not None:
            raise other
    if config.resume not in ("auto", "none"):
        checkpoint = _of_both(checkpoint, without_tilde(config.resume), folder, world)
    if checkpoint is not None:
        _check_can_go_on(checkpoint, config)
        if world.is_main:
            before = checkpoint.state
            logger.info("going on from %s, update %d", checkpoint.path, checkpoint.update)
            for change in changes(before["progress"]["config"], redacted(as_plain(config))):
                logger.info("changed since: %s", change)
            if before["world_size"] != world.world_size:
                logger.info("ranks: %d → %d", before["world_size"], world.world_size)
        return checkpoint
    if has_checkpoints:
        # To start over would throw its numbers away, and in the end what is left of these checkpoints.
        raise UserError(
            f"all checkpoints in {folder.path / CHECKPOINTS} are damaged, as the log says one by one: there is nothing "
            "to go on from. Put them right if the disk or its server can be mended, or go on from another run with "
            "resume=PATH, or remove that folder, and the run starts over."
        )
    if folder.is_restart and world.is_main:
        logger.info("%s holds a run that had not saved a checkpoint yet: it starts over", folder.path)
    return None


def _of_both(own: Checkpoint | None, named: Path, folder: RunFolder, world: World) -> Checkpoint:
    """Returns the run's own checkpoint, if it has one already, else the one that `resume` names."""
    if own is None:
        return _named_checkpoint(named, world)
    inside = folder.path.resolve() in named.resolve().parents
    checkpoints = folder.path / CHECKPOINTS  # own.path may lie in memory
    if inside and named.resolve() not in (own.path.resolve(), checkpoints.resolve()):
        raise UserError(
            f"resume={named} is not the newest checkpoint of run_dir={folder.path}, which is {own.path}: its results "
            "would no longer fit together. To go back to it, give the run another folder with run_dir=…"
        )
    if world.is_main and not inside:
        logger.info("resume=%s is where this run began; it has checkpoints of its own since", named)
    return own


def _check_can_go_on(checkpoint: Checkpoint, config: TrainConfig) -> None:
    if not config.checkpoint.enabled:
        raise UserError(
            f"checkpoint.enabled=false, but there is a checkpoint to go on from, {checkpoint.path}: leave that out, or "
            "begin anew in another run_dir."
        )
    check_progress(checkpoint, "Go on from it in the loop that saved it.")


def _named_checkpoint(path: Path, world: World) -> Checkpoint:
    with world.together():
        refuse_links(path, CHECKPOINTS)
    folders = world.from_main(checkpoints_in(path / CHECKPOINTS) or checkpoints_in(path))
    if folders:
        found = newest_whole(folders[0].parent, rank=world.rank, gather=world.gather)
        problem = "all of its checkpoints are damaged"
    else:
        found, problem = checked(path, rank=world.rank, gather=world.gather)
    if found is None:
        raise UserError(
            f"resume={path}: there is no checkpoint to go on from: {problem}. Give the path of a checkpoint (a folder "
            "`update-…`) or of the run folder that it is in."
        )
    return found
