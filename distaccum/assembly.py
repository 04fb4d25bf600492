"""From a configuration to a run: every part built, each by its own module, in the order that errors are cheapest."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distaccum import targets
from distaccum.batch_sizes import BatchSizes, NoiseSizes, SizeRamp, SizeRule, SizeTable
from distaccum.checkpoints import Checkpoint, Checkpointer, checked, checkpoints_in, newest_whole
from distaccum.choices import Balance, BatchSchedule, TableUnit, WandbMode
from distaccum.compilation import Compilation, CompileClock, resolve_compilation
from distaccum.config import (
    BatchConfig,
    ByLengthBatchConfig,
    DataConfig,
    Fp16Config,
    InsightConfig,
    PrecisionConfig,
    TrainConfig,
    flat,
)
from distaccum.data.lengths import lengths_of
from distaccum.devices import Precision, resolve_device, resolve_precision
from distaccum.distributed import World, joined_world
from distaccum.errors import UserError
from distaccum.interruption import Interruption
from distaccum.loaders import EvaluationLoader, LoaderOptions, WindowLoader
from distaccum.logs import logging_to
from distaccum.model_options import build_model
from distaccum.noise_scale import NoiseScale
from distaccum.observers import MetricsFile, Observer, Progress, RunEnd, Wandb
from distaccum.optim import Schedule, build_optimizer, schedule_factor
from distaccum.redaction import redacted, secrets_in
from distaccum.remembered import Remembered, fingerprint
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
from distaccum.strategies import needs_equal_forwards, needs_equal_micro_steps, place, shards_optimizer
from distaccum.tasks import CoupledTask
from distaccum.trainer import PROGRESS_KEYS, Trainer, total_updates

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
        check_same_config(world, plain)
        with world.together():
            made = stack.enter_context(held_run_folder(config.run_dir, config.resume, plain)) if world.is_main else None
        folder = world.from_main(made)
        assert folder is not None
        hidden = secrets_in(plain)
        with world.together(), logging_to(folder.path, world.rank, hidden):
            pass  # every rank can write its log, or all stop here
        interruption = Interruption(world)
        with logging_to(folder.path, world.rank, hidden), interruption.listening():
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
        checkpoint = _of_both(checkpoint, Path(config.resume).expanduser(), folder, world)
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
    if missing := PROGRESS_KEYS - checkpoint.state["progress"].keys():
        raise UserError(
            f"{checkpoint.path} was not saved by distaccum.train: it doesn't say {', '.join(sorted(missing))}. Go on "
            "from it in the loop that saved it."
        )


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


@dataclass(kw_only=True, slots=True)
class Parts:
    """What a configuration names, built, before the model is placed. Made by `build_parts`."""

    precision: Precision
    train_data: Any
    loader: WindowLoader
    evaluation_data: Any
    evaluation_loader: EvaluationLoader | None
    task: Any
    module: nn.Module
    """On the CPU, in the precision's parameter format."""


def build_parts(config: TrainConfig, device: torch.device, *, rank: int = 0, world_size: int = 1) -> Parts:
    """Builds data, task and model. The same model on every rank, and nothing in here waits for another rank.

    Raises:
        UserError: the configuration or the data don't fit.
    """
    seed_everything(derived_seed(config.seed, "model"))
    precision = resolve_precision(config.precision.name, device)
    options = _loader_options(config.data, device, precision)
    train_data = targets.build(config.data.train, "data.train")
    loader = WindowLoader(
        train_data,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=_largest_size(config.batch, world_size),
        accumulation_steps=config.batch.accumulation_steps,
        **_grouping_arguments(config, train_data, rank),
        drop_last=config.batch.drop_last,
        seed=config.seed,
        collate_fn=collate_fn(config.data),
        rank=rank,
        world_size=world_size,
        equal_micro_steps=needs_equal_micro_steps(config.strategy),
        split_every=config.insight.every_updates if config.insight.noise_scale else None,
        schedule=size_rule(config.batch),
        options=options,
    )
    smallest = dataclasses.replace(loader.plan, global_batch_size=loader.sizes.rule.smallest)
    if config.insight.noise_scale and smallest.is_one_shot:
        logger.info(
            "insight.noise_scale: a window is one micro-batch here, and noise can't be told from one part, so every %d "
            "updates it is cut into two; the update is the same but for rounding",
            config.insight.every_updates,
        )
    evaluation_data, evaluation_loader = _evaluation(config, options, rank, world_size)
    task = targets.build(config.task, "task")
    if not callable(task):
        raise UserError(f"task built a {type(task).__name__}, which can't be called.")
    module = build_model(config.model, train_data, getattr(config.strategy, "wrap", ()))
    return Parts(
        precision=precision,
        train_data=train_data,
        loader=loader,
        evaluation_data=evaluation_data,
        evaluation_loader=evaluation_loader,
        task=task,
        module=module.to(precision.parameter_dtype),
    )


def _largest_size(config: BatchConfig, world_size: int) -> int | None:
    if config.is_auto and config.global_batch_size is not None:
        return -(-config.global_batch_size // world_size)  # until it is known what fits
    return config.given_size


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
        factor = schedule_factor(config.schedule, _scheduled_updates(config, parts.loader.sizes))
        compilation = compilation_of(config, device)
        observers = _observers(config, folder, checkpoint) if world.is_main else []
    strategy = place(parts.module, config.strategy, device, config.precision.name, compilation)
    optimizer = build_optimizer(
        config.optim, strategy.model.parameters(), device, shard=shards_optimizer(config.strategy)
    )
    recovery = None
    if config.batch.is_auto:
        if isinstance(parts.task, CoupledTask):
            raise UserError(
                f"batch.micro_batch_size=auto can't be had with {type(parts.task).__name__}, whose loss couples the "
                "samples of a window: its micro-batches can't be taken again one by one. Give a number."
            )

        def forward(module: nn.Module, batch: Any) -> Any:
            with parts.precision.autocast():
                return parts.task(module, batch)

        recovery = settle_sizes(
            config, redacted(plain), world, parts.loader, strategy, optimizer, forward, parts.train_data, checkpoint
        )
    # Until here all ranks drew the same numbers, so that they built the same model; dropout must differ.
    seed_everything(derived_seed(config.seed, "rank", world.rank))
    checkpointer = (
        Checkpointer(
            folder.path / CHECKPOINTS,
            strategy.model,
            optimizer,
            config=config.checkpoint,
            strategy=strategy,
            timeout_seconds=config.distributed.timeout_seconds,
            files=[folder.path / METRICS],
        )
        if config.checkpoint.enabled
        else None
    )
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
        checkpointer=checkpointer,
        interruption=interruption,
        heartbeat=world.heartbeat,
        measure_costs=isinstance(config.batch, ByLengthBatchConfig) and config.batch.measure_costs,
        balance_speed=config.batch.balance is Balance.speed,
        recovery=recovery,
        noise_scale=_noise_scale(config.insight),
        compile_clock=CompileClock() if compilation is not None else None,
        lr_rule=config.batch.lr_rule,
    )


def _scheduled_updates(config: TrainConfig, sizes: BatchSizes) -> int:
    """The updates that the learning rate's schedule is laid out for."""
    if config.batch.schedule is BatchSchedule.noise and config.train.max_updates is not None:
        return config.train.max_updates  # how many an epoch will have is not known
    return total_updates(config.train, sizes)


def size_rule(config: BatchConfig) -> SizeRule | None:
    """The schedule of the sizes of windows; None where they have one size."""
    base = config.global_batch_size
    if config.schedule is BatchSchedule.constant or base is None:
        return None
    if config.schedule is BatchSchedule.table:
        return SizeTable(
            base, {entry[0]: entry[1] for entry in config.table}, by_epoch=config.table_unit is TableUnit.epoch
        )
    if config.schedule is BatchSchedule.ramp:
        assert config.ramp_from is not None
        assert config.ramp_updates is not None
        return SizeRamp(base, start=config.ramp_from, updates=config.ramp_updates)
    assert config.min_size is not None
    assert config.max_size is not None
    return NoiseSizes(base, smallest=config.min_size, largest=config.max_size)


def _noise_scale(config: InsightConfig) -> NoiseScale | None:
    return NoiseScale(every_updates=config.every_updates, smoothing=config.smoothing) if config.noise_scale else None


def compilation_of(config: TrainConfig, device: torch.device) -> Compilation | None:
    """How the model is to be compiled; None for not at all.

    Raises:
        UserError: this machine can't.
    """
    if not config.compile:
        return None
    dynamic = config.compile_dynamic
    if dynamic is None and isinstance(config.batch, ByLengthBatchConfig):
        dynamic = True
    return resolve_compilation(config.compile_backend, dynamic, device)


def as_plain(config: Any) -> Any:
    """A configuration as dictionaries, lists, strings, numbers and None."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {entry.name: as_plain(getattr(config, entry.name)) for entry in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: as_plain(value) for key, value in config.items()}
    if isinstance(config, list):
        return [as_plain(value) for value in config]
    return config.name if isinstance(config, Enum) else config


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


def _grouping_arguments(config: TrainConfig, data: Any, rank: int) -> dict[str, Any]:
    if not isinstance(config.batch, ByLengthBatchConfig):
        return {}
    # A file for each rank, as ranks of one host write at the same time.
    name = f"lengths-{fingerprint([redacted(as_plain(config.data.train)), type(data).__qualname__])}-rank{rank}"
    return {"lengths": lengths_of(data, Remembered(name)), "max_tokens": config.batch.max_tokens}


def _loader_options(config: DataConfig, device: torch.device, precision: Precision) -> LoaderOptions:
    on_cuda = device.type == "cuda"
    if config.pin_memory and not on_cuda:
        logger.warning("data.pin_memory=true has no effect: the device is a CPU")
    return LoaderOptions(
        num_workers=config.num_workers,
        pin_memory=on_cuda and config.pin_memory is not False,
        persistent_workers=config.num_workers > 0 and config.persistent_workers is not False,
        prefetch_factor=config.prefetch_factor,
        device=device,
        float_dtype=precision.input_dtype,
        non_blocking=config.non_blocking,
    )


def _evaluation(
    config: TrainConfig, options: LoaderOptions, rank: int, world_size: int
) -> tuple[Any, EvaluationLoader | None]:
    if config.data.evaluation is None:
        wanted = {"early_stopping.metric": config.train.early_stopping.metric, "eval_every": config.train.eval_every}
        for key, value in wanted.items():
            if value is not None:
                raise UserError(f"train.{key}={value} needs evaluations, and data.evaluation is null: leave one out.")
        return None, None
    data = targets.build(config.data.evaluation, "data.evaluation")
    loader = EvaluationLoader(
        data,
        batch_size=config.train.eval_batch_size,
        collate_fn=collate_fn(config.data),
        rank=rank,
        world_size=world_size,
        options=options,
        equal_batches=needs_equal_forwards(config.strategy),
    )
    return data, loader


def collate_fn(config: DataConfig) -> Any:
    """The configured function that makes micro-batches; None if none is."""
    if config.collate_fn is None:
        return None
    found = targets.build(config.collate_fn, "data.collate_fn")
    if not callable(found):
        raise UserError(f"data.collate_fn built a {type(found).__name__}, which can't be called.")
    return found


def build_scaler(config: PrecisionConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """The gradient scaler of a precision; None for all but fp16."""
    if not isinstance(config, Fp16Config):
        return None
    return torch.amp.GradScaler(device.type, init_scale=config.init_scale, growth_interval=config.growth_interval)


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
