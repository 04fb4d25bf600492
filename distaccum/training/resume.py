"""Where a run goes on from: the checkpoint, and whether it fits."""

from __future__ import annotations

import logging
from pathlib import Path

from distaccum.checkpoints import Checkpoint, checked, checkpoints_in, newest_whole
from distaccum.config import TrainConfig, as_plain
from distaccum.config.redaction import redacted
from distaccum.errors import UserError
from distaccum.runtime.files import without_tilde
from distaccum.runtime.world import World
from distaccum.training.progress import check_progress
from distaccum.training.run_folder import CHECKPOINTS, RunFolder, changes

logger = logging.getLogger(__name__)


def find_checkpoint(config: TrainConfig, folder: RunFolder, world: World) -> Checkpoint | None:
    """The checkpoint that the run goes on from, found whole; None for a run that begins anew.

    Raises:
        UserError: `resume` names one that is not there or is damaged.
    """
    checkpoint = newest_whole(folder.path / CHECKPOINTS, rank=world.rank, gather=world.gather)
    if config.resume not in ("auto", "none"):
        checkpoint = _of_both(checkpoint, without_tilde(config.resume), folder, world)
    if checkpoint is not None:
        _check_can_go_on(checkpoint, config)
    if checkpoint is not None and world.is_main:
        before = checkpoint.state
        logger.info("going on from %s, update %d", checkpoint.path, checkpoint.update)
        for change in changes(before["progress"]["config"], redacted(as_plain(config))):
            logger.info("changed since: %s", change)
        if before["world_size"] != world.world_size:
            logger.info("ranks: %d → %d", before["world_size"], world.world_size)
    damaged = checkpoint is None and world.from_main(bool(checkpoints_in(folder.path / CHECKPOINTS)))
    if damaged:
        # To start over would throw its numbers away, and in the end what is left of these checkpoints.
        raise UserError(
            f"all checkpoints in {folder.path / CHECKPOINTS} are damaged, as the log says one by one: there is nothing "
            "to go on from. Put them right if the disk or its server can be mended, or go on from another run with "
            "resume=PATH, or remove that folder, and the run starts over."
        )
    if folder.is_restart and checkpoint is None and world.is_main:
        logger.info("%s holds a run that had not saved a checkpoint yet: it starts over", folder.path)
    return checkpoint


def _of_both(own: Checkpoint | None, named: Path, folder: RunFolder, world: World) -> Checkpoint:
    """The run's own checkpoint, if it has one already, else the one that `resume` names."""
    if own is None:
        return _named_checkpoint(named, world)
    inside = folder.path.resolve() in named.resolve().parents
    if inside and named.resolve() not in (own.path.resolve(), own.path.parent.resolve()):
        raise UserError(
            f"resume={named} is not the newest checkpoint in run_dir={folder.path}, whose results would no longer fit "
            "together. To go back to it, give the run another folder with run_dir=…"
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
