"""What a configuration names, built before the model is placed: data, windows, task, model. No rank waits in here."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distaccum import targets
from distaccum.batch_sizes import NoiseSizes, SizeRamp, SizeRule, SizeTable
from distaccum.checkpoints import load_exported
from distaccum.choices import BatchSchedule, TableUnit
from distaccum.compilation import Compilation, resolve_compilation
from distaccum.config import (
    BatchConfig,
    ByLengthBatchConfig,
    DataConfig,
    Fp16Config,
    PrecisionConfig,
    TrainConfig,
    as_plain,
)
from distaccum.data.lengths import lengths_of
from distaccum.devices import Precision, cast, is_out_of_memory, resolve_precision
from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader, LoaderOptions, WindowLoader
from distaccum.model_options import build_model, into_training_mode, options_of
from distaccum.remembered import Remembered, fingerprint
from distaccum.seeding import derived_seed, seed_everything
from distaccum.strategies import needs_equal_forwards, needs_equal_micro_steps

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
        wanted = {"early_stopping.metric": config.train.early_stopping.metric, "eval_every": config.train.eval_every}
        for key, value in wanted.items():
            if value is not None:
                raise UserError(f"train.{key}={value} needs evaluations, and data.evaluation is null: leave one out.")
        if config.checkpoint.keep_best:
            raise UserError(
                f"checkpoint.keep_best={config.checkpoint.keep_best} needs evaluations, and data.evaluation is null: "
                "leave one out."
            )
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
