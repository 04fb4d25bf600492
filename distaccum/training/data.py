"""Builds the datasets and loaders that a configuration names."""

from __future__ import annotations

import logging
from typing import Any

import torch

from distaccum.config import BatchConfig, ByLengthBatchConfig, DataConfig, PackedBatchConfig, TrainConfig, as_plain
from distaccum.config import instantiate as targets
from distaccum.config.enums import BatchSchedule, TableUnit
from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader, LoaderOptions, WindowLoader
from distaccum.loaders.lengths import lengths_of
from distaccum.planning.window_sizes import NoiseSizes, SizeRamp, SizeRule, SizeTable
from distaccum.runtime.cache import Remembered, fingerprint
from distaccum.runtime.devices import Precision
from distaccum.runtime.world import World
from distaccum.strategies import needs_equal_forwards, needs_equal_micro_steps

logger = logging.getLogger(__name__)


def build_window_loader(
    config: TrainConfig,
    train_data: Any,
    options: LoaderOptions,
    *,
    rank: int,
    world_size: int,
    equal_micro_steps: bool = False,
) -> WindowLoader:
    """Builds the loader of the windows to train on.

    Args:
        equal_micro_steps: give all ranks equally many micro-steps, whatever the strategy.

    Raises:
        UserError: the batch numbers, the schedule of sizes or the lengths don't fit the data.
    """
    batch = config.batch
    micro_batch_size = batch.given_size
    if batch.is_auto and batch.global_batch_size is not None:
        micro_batch_size = -(-batch.global_batch_size // world_size)  # until it is known what fits
    if getattr(train_data, "is_endless", False):
        _check_endless(config)
    by_length: dict[str, Any] = {}
    if isinstance(batch, ByLengthBatchConfig):
        name = f"lengths-{fingerprint([as_plain(config.data.train), type(train_data).__qualname__])}"
        by_length = {
            "lengths": lengths_of(train_data, Remembered(name)),
            "max_tokens": batch.max_tokens,
            "packed": isinstance(batch, PackedBatchConfig),
        }
    return WindowLoader(
        train_data,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=micro_batch_size,
        accumulation_steps=batch.accumulation_steps,
        **by_length,
        drop_last=batch.drop_last,
        seed=config.seed,
        collate_fn=collate_fn(config.data),
        rank=rank,
        world_size=world_size,
        equal_micro_steps=equal_micro_steps or needs_equal_micro_steps(config.strategy),
        split_every=config.insight.every_updates if config.insight.noise_scale else None,
        schedule=size_rule(batch),
        options=options,
    )


def check_same_stream(train_data: Any, world: World) -> None:
    """Refuses a stream that is another one on each rank, whose windows would be no windows of it. All ranks call it.

    Raises:
        UserError: numbers of samples, shards or first samples differ.
    """
    if not hasattr(train_data, "fingerprint") or world.world_size == 1:
        return
    with world.together():
        own = train_data.fingerprint()
    found = world.gather(own)
    if (other := next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)) is not None:
        raise UserError(
            f"the training stream is another one on rank {other} than on rank 0 ({found[other]} and {found[0]}: order, "
            "number of samples, checksum of the first one). Every rank must read the same, as each takes its own "
            "samples of a window: take out what divides it up by rank, and give all ranks the same files."
        )


def _check_endless(config: TrainConfig) -> None:
    if config.train.max_updates is None:
        raise UserError("data.endless=true has no end of an epoch, so the run would have none: set train.max_updates.")
    if config.data.evaluation is not None and config.train.eval_every is None:
        logger.info("an endless stream is evaluated at the end of the run alone, unless train.eval_every is set")


def build_evaluation(
    config: TrainConfig,
    options: LoaderOptions,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    workers_of: WindowLoader | None = None,
) -> tuple[Any, EvaluationLoader | None]:
    """Builds the evaluation data and its loader; both are None without `data.evaluation`.

    Args:
        workers_of: the training's loader, which may have to find the number of workers.

    Raises:
        UserError: the configuration asks for evaluations and names no data for them.
    """
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
        workers_of=workers_of,
        equal_batches=needs_equal_forwards(config.strategy),
    )
    return data, loader


def loader_options(config: DataConfig, device: torch.device, precision: Precision) -> LoaderOptions:
    """Returns how loaders bring data to a device."""
    on_cuda = device.type == "cuda"
    if config.pin_memory and not on_cuda:
        logger.warning("data.pin_memory=true has no effect: the device is a CPU")
    return LoaderOptions(
        num_workers=config.num_workers,
        pin_memory=on_cuda and config.pin_memory is not False,
        persistent_workers=config.num_workers != 0 and config.persistent_workers is not False,
        prefetch_factor=config.prefetch_factor,
        device=device,
        float_dtype=precision.input_dtype,
        non_blocking=config.non_blocking,
    )


def collate_fn(config: DataConfig) -> Any:
    """Builds the configured function that makes micro-batches; None if none is configured."""
    if config.collate_fn is None:
        return None
    found = targets.build(config.collate_fn, "data.collate_fn")
    if not callable(found):
        raise UserError(f"data.collate_fn built a {type(found).__name__}, which can't be called.")
    return found


def size_rule(config: BatchConfig) -> SizeRule | None:
    """Builds the schedule of the sizes of windows; None where they have one size."""
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
