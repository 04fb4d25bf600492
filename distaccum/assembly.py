"""From a configuration to a run: every part built, each by its own module, in the order that errors are cheapest."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distaccum import targets
from distaccum.checkpoints import Checkpoint, Checkpointer, checked, checkpoints_in, newest_whole
from distaccum.choices import Balance, BatchSchedule, WandbMode
from distaccum.compilation import CompileClock
from distaccum.config import (
    ByLengthBatchConfig,
    InsightConfig,
    TrainConfig,
    as_plain,
    flat,
)
from distaccum.continuing import check_progress, total_updates, updates_ahead
from distaccum.devices import resolve_device
from distaccum.distributed import World, joined_world
from distaccum.errors import UserError
from distaccum.files import without_tilde
from distaccum.interruption import Interruption
from distaccum.loaders import WindowLoader
from distaccum.logs import logging_to
from distaccum.noise_scale import NoiseScale
from distaccum.observers import MetricsFile, Observer, Progress, RunEnd, Wandb
from distaccum.optim import Schedule, build_optimizer, schedule_factor
from distaccum.parts import Parts, build_parts, build_scaler, compilation_of
from distaccum.recovery import Recovery
from distaccum.redaction import hide, redacted
from distaccum.run_folder import (
    CHECKPOINTS,
    METRICS,
    RunFolder,
    begin,
    changes,
    held_run_folder,
    leave_marker,
)
from distaccum.seeding import derived_seed, seed_everything
from distaccum.sizing import settle_sizes
from distaccum.strategies import Strategy, place, shards_optimizer
from distaccum.tasks import CoupledTask, checked_output
from distaccum.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> RunEnd:
    """Runs a training from its configuration, in the ranks that the launcher has started.

    Raises:
        UserError: whatever in the configuration, the data or the machine keeps the run from going on.
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
            end = trainer.fit()
            if end.interrupted is not None and world.is_main:
                leave_marker(folder.path, end.updates, end.interrupted)
            return end


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


def build_trainer(
    config: TrainConfig,
    world: World,
    device: torch.device,
    folder: RunFolder,
    plain: dict[str, Any],
    checkpoint: Checkpoint | None = None,
    interruption: Interruption | None = None,
) -> Trainer:
    """Builds what a configuration names. What a rank can do alone comes before anything that ranks wait in.

    Args:
        checkpoint: the one that the run is to go on from, for those who continue files.
    """
    with world.together():
        parts = build_parts(config, device, rank=world.rank, world_size=world.world_size)
        factor = schedule_factor(config.schedule, _scheduled_updates(config, parts.loader, checkpoint))
        compilation = compilation_of(config, device)
        observers = _observers(config, folder, checkpoint) if world.is_main else []
    strategy = place(parts.module, config.strategy, device, config.precision.name, compilation)
    optimizer = build_optimizer(
        config.optim, strategy.model.parameters(), device, shard=shards_optimizer(config.strategy)
    )
    recovery = None
    if config.batch.is_auto:
        recovery = _settled(config, plain, world, parts, strategy, optimizer, checkpoint)
        if parts.evaluation_loader is not None and config.train.eval_batch_size is None:
            parts.evaluation_loader.set_batch_size(parts.loader.micro_batch_size)
    # Until here all ranks drew the same numbers, so that they built the same model; dropout must differ.
    seed_everything(derived_seed(config.seed, "rank", world.rank))
    return Trainer(
        model=strategy.model,
        task=parts.task,
        optimizer=optimizer,
        loader=parts.loader,
        loop=config.train,
        schedule=Schedule(optimizer, factor),
        evaluation_loader=parts.evaluation_loader,
        references=getattr(parts.evaluation_data, "reference_losses", None),
        precision=parts.precision,
        scaler=build_scaler(config.precision, device),
        observers=observers,
        strategy=strategy,
        run_dir=folder.path,
        config=redacted(plain),
        checkpointer=_checkpointer(config, folder, strategy, optimizer),
        interruption=interruption,
        heartbeat=world.heartbeat,
        measure_costs=isinstance(config.batch, ByLengthBatchConfig) and config.batch.measure_costs,
        balance_speed=config.batch.balance is Balance.speed,
        recovery=recovery,
        noise_scale=_noise_scale(config.insight),
        compile_clock=CompileClock() if compilation is not None else None,
        lr_rule=config.batch.lr_rule,
    )


def _settled(
    config: TrainConfig,
    plain: dict[str, Any],
    world: World,
    parts: Parts,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint | None,
) -> Recovery:
    """Finds the micro-batch size of each rank, and what helps it when memory runs out all the same."""
    if isinstance(parts.task, CoupledTask):
        raise UserError(
            f"batch.micro_batch_size=auto can't be had with {type(parts.task).__name__}, whose loss couples the "
            "samples of a window: its micro-batches can't be taken again one by one. Give a number."
        )

    def forward(module: nn.Module, batch: Any) -> Any:
        with parts.precision.autocast():
            return checked_output(parts.task(module, batch))

    return settle_sizes(config, plain, world, parts.loader, strategy, optimizer, forward, parts.train_data, checkpoint)


def _checkpointer(
    config: TrainConfig, folder: RunFolder, strategy: Strategy, optimizer: torch.optim.Optimizer
) -> Checkpointer | None:
    if not config.checkpoint.enabled:
        return None
    return Checkpointer(
        folder.path / CHECKPOINTS,
        strategy.model,
        optimizer,
        config=config.checkpoint,
        strategy=strategy,
        timeout_seconds=config.distributed.timeout_seconds,
        files=[folder.path / METRICS],
    )


def _scheduled_updates(config: TrainConfig, loader: WindowLoader, checkpoint: Checkpoint | None) -> int:
    """The updates that the learning rate's schedule is laid out for."""
    if config.batch.schedule is BatchSchedule.noise and config.train.max_updates is not None:
        return config.train.max_updates  # how many an epoch will have is not known
    follows_noise = config.batch.schedule is BatchSchedule.noise
    ahead = updates_ahead(checkpoint.state["progress"], loader) if checkpoint is not None and not follows_noise else 0
    return total_updates(config.train, loader.sizes, ahead)


def _noise_scale(config: InsightConfig) -> NoiseScale | None:
    return NoiseScale(every_updates=config.every_updates, smoothing=config.smoothing) if config.noise_scale else None


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


def _observers(config: TrainConfig, folder: RunFolder, checkpoint: Checkpoint | None) -> list[Observer]:
    run_dir = folder.path
    source = checkpoint.path.parent.parent if checkpoint is not None else None
    observers: list[Observer] = [Progress(), MetricsFile(run_dir, continues=folder.is_restart, start_from=source)]
    if config.wandb.mode is not WandbMode.disabled:
        wandb = config.wandb
        observers.append(Wandb(run_dir, wandb.mode, wandb.project, wandb.name or run_dir.name, wandb.tags))
    for name, section in config.observers.items():
        observer = targets.build(section, f"observers.{name}")
        if not isinstance(observer, Observer):
            raise UserError(f"observers.{name} built a {type(observer).__name__}, not a distaccum.observers.Observer.")
        observers.append(observer)
    return observers
