"""What a configuration names, built before the model is placed: data, windows, task, model. No rank waits in here."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.accumulation.recovery import Recovery
from distaccum.checkpoints import Checkpoint, Checkpointer, load_exported
from distaccum.config import (
    BatchConfig,
    ByLengthBatchConfig,
    DataConfig,
    Fp16Config,
    PrecisionConfig,
    TrainConfig,
    as_plain,
)
from distaccum.config import instantiate as targets
from distaccum.config.enums import Balance, BatchSchedule, TableUnit, WandbMode
from distaccum.config.launcher import launch
from distaccum.config.redaction import redacted
from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader, LoaderOptions, WindowLoader
from distaccum.loaders.lengths import lengths_of
from distaccum.observers import MetricsFile, Observer, Progress, Wandb
from distaccum.observers.run_file import RunFile
from distaccum.planning.window_sizes import NoiseSizes, SizeRamp, SizeRule, SizeTable
from distaccum.runtime.cache import Remembered, fingerprint
from distaccum.runtime.compilation import Compilation, CompileClock, resolve_compilation
from distaccum.runtime.devices import Precision, cast, resolve_precision
from distaccum.runtime.memory import is_out_of_memory
from distaccum.runtime.randomness import derived_seed, seed_everything
from distaccum.runtime.stop_signals import Interruption
from distaccum.runtime.world import World
from distaccum.strategies import Strategy, needs_equal_forwards, needs_equal_micro_steps, place, shards_optimizer
from distaccum.tasks import CoupledTask, checked_output
from distaccum.training.auto_micro_batch import Fitting, settle_sizes
from distaccum.training.model import build_model, into_training_mode, options_of
from distaccum.training.optim import Schedule, build_optimizer, schedule_factor
from distaccum.training.progress import total_updates, updates_ahead
from distaccum.training.run_folder import CHECKPOINTS, METRICS, RunFolder
from distaccum.training.trainer import Trainer

logger = logging.getLogger(__name__)


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
    woken: list[str]
    """Names of its parts that were built in evaluation mode and have been put into training mode."""


def build_parts(
    config: TrainConfig, device: torch.device, *, rank: int = 0, world_size: int = 1, equal_micro_steps: bool = False
) -> Parts:
    """Builds data, task and model. The same model on every rank, and nothing in here waits for another rank.

    Args:
        equal_micro_steps: give all ranks equally many micro-steps, whatever the strategy.

    Raises:
        UserError: the configuration or the data don't fit.
    """
    seed_everything(derived_seed(config.seed, "model"))
    precision = resolve_precision(config.precision.name, device)
    options = loader_options(config.data, device, precision)
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
        equal_micro_steps=equal_micro_steps or needs_equal_micro_steps(config.strategy),
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
    size = config.train.eval_batch_size or loader.micro_batch_size
    evaluation_data, evaluation_loader = _evaluation(config, options, rank, world_size, size)
    task = targets.build(config.task, "task")
    if not callable(task):
        raise UserError(f"task built a {type(task).__name__}, which can't be called.")
    try:
        module = build_model(config.model, train_data, getattr(config.strategy, "wrap", ()))
    except (RuntimeError, TypeError, MemoryError) as error:
        if not is_out_of_memory(error) and "overflow" not in str(error).lower():
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"the model is too large to be built: {reason}. Lower the sizes in model or data.") from error
    woken = into_training_mode(module) if not config.train.keep_modes else []
    parts = Parts(
        precision=precision,
        train_data=train_data,
        loader=loader,
        evaluation_data=evaluation_data,
        evaluation_loader=evaluation_loader,
        task=task,
        module=cast(module, precision.parameter_dtype),
        woken=woken,
    )
    if initial := options_of(config.model)[1].get("init_from"):
        load_exported(parts.module, str(initial), "model.init_from")
        logger.info("model.init_from: the weights come from %s", initial)
    return parts


def _largest_size(config: BatchConfig, world_size: int) -> int | None:
    if config.is_auto and config.global_batch_size is not None:
        return -(-config.global_batch_size // world_size)  # until it is known what fits
    return config.given_size


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


def _grouping_arguments(config: TrainConfig, data: Any, rank: int) -> dict[str, Any]:
    if not isinstance(config.batch, ByLengthBatchConfig):
        return {}
    # A file for each rank, as ranks of one host write at the same time.
    name = f"lengths-{fingerprint([as_plain(config.data.train), type(data).__qualname__])}-rank{rank}"
    return {"lengths": lengths_of(data, Remembered(name)), "max_tokens": config.batch.max_tokens}


def loader_options(config: DataConfig, device: torch.device, precision: Precision) -> LoaderOptions:
    """How loaders are to bring data to a device."""
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
    config: TrainConfig, options: LoaderOptions, rank: int, world_size: int, batch_size: int
) -> tuple[Any, EvaluationLoader | None]:
    if config.data.evaluation is None:
        wanted = {
            "train.early_stopping.metric": config.train.early_stopping.metric,
            "train.eval_every": config.train.eval_every,
            "checkpoint.keep_best": config.checkpoint.keep_best or None,
        }
        for key, value in wanted.items():
            if value is not None:
                raise UserError(f"{key}={value} needs evaluations, and data.evaluation is null: leave one out.")
        return None, None
    data = targets.build(config.data.evaluation, "data.evaluation")
    loader = EvaluationLoader(
        data,
        batch_size=batch_size,
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
    insight = config.insight
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
        noise_scale=NoiseScale(every_updates=insight.every_updates, smoothing=insight.smoothing)
        if insight.noise_scale
        else None,
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

    lengths = parts.loader.lengths if parts.loader.lengths is not None else getattr(parts.train_data, "lengths", None)
    fitting = Fitting(
        parts.loader,
        strategy,
        forward,
        optimizer,
        lengths=lengths,
        memory_share=config.batch.auto_memory,
        ranks_on_host=launch().local_world_size,
    )
    return settle_sizes(fitting, plain, world, checkpoint)


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
    follows_noise = config.batch.schedule is BatchSchedule.noise
    if follows_noise and config.train.max_updates is not None:
        return config.train.max_updates  # how many an epoch will have is not known
    ahead = updates_ahead(checkpoint.state["progress"], loader) if checkpoint is not None and not follows_noise else 0
    return total_updates(config.train, loader.sizes, ahead)


def _observers(config: TrainConfig, folder: RunFolder, checkpoint: Checkpoint | None) -> list[Observer]:
    run_dir = folder.path
    source = checkpoint.path.parent.parent if checkpoint is not None else None
    metrics_file = MetricsFile(run_dir, continues=folder.is_restart, start_from=source)
    observers: list[Observer] = [Progress(), metrics_file, RunFile(run_dir)]
    if config.wandb.mode is not WandbMode.disabled:
        wandb = config.wandb
        observers.append(Wandb(run_dir, wandb.mode, wandb.project, wandb.name or run_dir.name, wandb.tags))
    for name, section in config.observers.items():
        observer = targets.build(section, f"observers.{name}")
        if not isinstance(observer, Observer):
            raise UserError(f"observers.{name} built a {type(observer).__name__}, not a distaccum.observers.Observer.")
        observers.append(observer)
    return observers
