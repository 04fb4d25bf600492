"""What `python -m distaccum.memory` measures: the configured setting, and what one change at a time would do to it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import nn

from distaccum.config import DDPConfig, FSDPConfig, StrategyConfig
from distaccum.config.components import AdamConfig, AdamW8bitConfig
from distaccum.config.enums import Compression, PrecisionName
from distaccum.config.launcher import launch
from distaccum.config.tools import MemoryConfig
from distaccum.errors import UserError
from distaccum.loaders.collate import PadCollate
from distaccum.planning import resolve_batch
from distaccum.runtime.devices import resolve_device
from distaccum.runtime.logs import print_error
from distaccum.runtime.memory import is_out_of_memory
from distaccum.runtime.nested import to_device
from distaccum.strategies import needs_equal_micro_steps
from distaccum.strategies.blocks import blocks_of
from distaccum.tasks import CoupledTask
from distaccum.tools.memory.lines import sizes_to_measure
from distaccum.tools.memory.measuring import Footprint, Setting, measure, replicas_of
from distaccum.tools.memory.report import Report, Row
from distaccum.training.build import Parts, build_parts
from distaccum.training.data import collate_fn
from distaccum.training.model import take_back_checkpointing
from distaccum.training.optim import has_8bit

GIB = 1 << 30

_OTHER_PLACEMENTS: dict[str, StrategyConfig] = {
    "strategy=ddp": DDPConfig(),
    "strategy=ddp strategy.shard_optimizer=true": DDPConfig(shard_optimizer=True),
    "strategy=fsdp": FSDPConfig(),
    "strategy=fsdp strategy.reshard_in_window=false": FSDPConfig(reshard_in_window=False),
}


class DoesNotFitError(UserError):
    """Memory has run out at the smallest micro-batch that was tried of the configured setting."""


def memory(config: MemoryConfig) -> int:
    """Measures, prints the report, and returns the exit status: 0 if the configured setting fits.

    Raises:
        UserError: whatever in the configuration, the data or the machine keeps it from being measured.
    """
    if launch().world_size > 1:
        raise UserError("distaccum.memory is one process: start it without torchrun, and say memory.world_size=…")
    try:
        report = examine(config)
    except DoesNotFitError as error:
        print_error(str(error))
        return 1
    if config.memory.json:
        sys.stdout.write(report.as_json() + "\n")
    else:
        report.print(Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    sys.stdout.flush()
    return 0 if report.fits else 1


def examine(config: MemoryConfig) -> Report:
    """Measures all rows of the report.

    Raises:
        DoesNotFitError: as it says.
        UserError: as `memory`.
    """
    device = resolve_device(config.device)
    world_size = _world_size(config)
    configured_strategy = _measurable(config.strategy)
    parts = build_parts(config, device, world_size=world_size)
    is_checkpointed = take_back_checkpointing(parts.module)
    if isinstance(parts.task, CoupledTask):
        raise UserError(
            f"distaccum.memory can't measure {type(parts.task).__name__}, whose loss couples the samples of a window: "
            "its micro-steps are others. Train for a few updates, and see the peak in the summary."
        )
    global_batch_size = parts.loader.plan.global_batch_size
    share = -(-global_batch_size // world_size)
    accumulation_steps, micro_batch = _cut(config, global_batch_size, configured_strategy, world_size)
    configured = Setting(
        strategy=configured_strategy,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        optim=config.optim,
        activation_checkpointing=is_checkpointed,
        wrap=getattr(config.strategy, "wrap", ()),
        averages=config.train.averages,
    )
    limit = config.memory.limit_gb * GIB if config.memory.limit_gb else _memory_of(device)
    usable = limit * (1 - config.memory.headroom)
    batch_of = _batches(config, parts.train_data, parts, device)
    if (data := parts.evaluation_data) is not None:
        of_evaluation, fixed = _batches(config, data, parts, device), config.train.eval_batch_size
        configured = dataclasses.replace(
            configured, evaluation_batch_of=lambda size: of_evaluation(min(fixed or size, len(data)))
        )

    def measured(setting: Setting, sizes: list[int]) -> Footprint:
        return measure(
            parts.module,
            setting,
            parts.task,
            batch_of,
            sizes,
            device=device,
            precision=parts.precision,
            clip_norm=config.train.clip_norm,
            limit=usable,
        )

    wanted = [("", "configured", configured), *_changes(config, configured, parts.module, global_batch_size)]
    chosen = wanted if config.memory.alternatives else wanted[:1]
    rows, left_out = _rows(config, parts, device, chosen, micro_batch, measured)
    return Report(
        model=type(parts.module).__name__,
        device=str(device),
        precision=config.precision.name.value,
        limit=int(limit),
        usable=int(usable),
        share=share,
        rows=rows,
        left_out=left_out,
        can_install_8bit=config.memory.alternatives and _can_be_8bit(configured) and not has_8bit(),
    )


def _rows(
    config: MemoryConfig,
    parts: Parts,
    device: torch.device,
    wanted: list[tuple[str, str, Setting]],
    micro_batch: int,
    measured: Callable[[Setting, list[int]], Footprint],
) -> tuple[list[Row], list[str]]:
    """Those that can be had, and the labels of those that can't, with the reasons.

    Args:
        wanted: what is changed, label and setting of each; the first is the configured one, whose cut the others have
            if nothing of it changes.
        micro_batch: of the configured one.
        measured: measures a setting with some sizes of micro-batches.

    Raises:
        DoesNotFitError: the configured one.
    """
    configured = wanted[0][2]
    global_batch_size, num_samples = parts.loader.plan.global_batch_size, len(parts.train_data)
    rows: list[Row] = []
    left_out = []
    console = Console(stderr=True)
    is_silent = config.memory.json or not console.is_terminal
    column = TextColumn("measuring: {task.description}")
    with Progress(column, console=console, transient=True, disable=is_silent) as progress:
        task = progress.add_task("", total=None)
        for change, label, setting in wanted:
            progress.update(task, description=label, refresh=True)
            steps = setting.accumulation_steps
            size = micro_batch
            if (steps, setting.world_size) != (configured.accumulation_steps, configured.world_size):
                size = -(-global_batch_size // (setting.world_size * steps))
            size = min(size, num_samples)
            sizes = sizes_to_measure(size, num_samples, replicas_of(setting.strategy, device))
            try:
                footprint = measured(setting, sizes)
            except Exception as error:
                if isinstance(error, UserError) and rows:
                    left_out.append(f"{label} ({str(error).partition('. ')[0]})")
                    continue
                if not is_out_of_memory(error):
                    raise
                if not rows:
                    raise DoesNotFitError(
                        f"it does not fit: memory ran out on {device} with micro-batches of {sizes[0]}, the smallest "
                        "that was tried. Lower batch.micro_batch_size, or take a smaller model, precision=bf16, "
                        "model.activation_checkpointing=true, or strategy=fsdp on several devices."
                    ) from error
                left_out.append(f"{label} (memory ran out)")
                continue
            rows.append(Row(label, change, setting.world_size, steps, size, footprint))
    return rows, left_out


def _world_size(config: MemoryConfig) -> int:
    if not isinstance(config.strategy, DDPConfig | FSDPConfig):
        return 1
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return config.memory.world_size or max(2, gpus)


def _measurable(strategy: StrategyConfig) -> StrategyConfig:
    """PowerSGD's factors can't be measured without the other ranks; they are small beside the buckets."""
    if isinstance(strategy, DDPConfig) and strategy.compression is Compression.powersgd:
        return dataclasses.replace(strategy, compression=Compression.none)
    return strategy


def _cut(config: MemoryConfig, window: int, strategy: StrategyConfig, world_size: int) -> tuple[int, int]:
    """Micro-steps of rank 0 in a full window, and the samples of the largest of them."""
    plan = resolve_batch(
        world_size=world_size,
        global_batch_size=window,
        micro_batch_size=config.batch.given_size,
        accumulation_steps=config.batch.accumulation_steps if config.batch.global_batch_size else None,
        equal_micro_steps=needs_equal_micro_steps(strategy),
    )
    sizes = plan.cut(window).sizes[0]
    return len(sizes), max(sizes)


def _changes(
    config: MemoryConfig, configured: Setting, module: nn.Module, window: int
) -> Iterator[tuple[str, str, Setting]]:
    """One change at a time: the overrides that make it, its name, and the setting."""
    change = dataclasses.replace
    share = -(-window // configured.world_size)
    steps = configured.accumulation_steps
    for other in (1, min(share, 2 * steps)) if steps > 1 else (min(share, 2),):
        if other != steps:
            override = f"batch.micro_batch_size=null batch.accumulation_steps={other}"
            yield override, f"K = {other}", change(configured, accumulation_steps=other)
    if has_8bit() and _can_be_8bit(configured):
        yield "optim=adamw8bit", "8-bit AdamW", change(configured, optim=AdamW8bitConfig())
    if blocks_of(module, configured.wrap):
        on = not configured.activation_checkpointing
        name = f"activation checkpointing {'on' if on else 'off'}"
        override = f"model.activation_checkpointing={str(on).lower()}"
        yield override, name, change(configured, activation_checkpointing=on)
    ranks = configured.world_size
    if ranks == 1:
        ranks = config.memory.world_size or max(2, torch.cuda.device_count())
    for override, strategy in _OTHER_PLACEMENTS.items():
        is_impossible = isinstance(strategy, DDPConfig) and config.precision.name is PrecisionName.bf16_params
        if strategy == configured.strategy or is_impossible:
            continue
        needs_whole = config.precision.name is PrecisionName.fp16 or isinstance(config.optim, AdamW8bitConfig)
        if needs_whole and isinstance(strategy, FSDPConfig):
            continue
        other, _ = _cut(config, window, strategy, ranks)
        name = f"{override.replace('strategy.', '').replace('strategy=', '')}, {ranks} ranks"
        yield override, name, change(configured, strategy=strategy, world_size=ranks, accumulation_steps=other)


def _can_be_8bit(configured: Setting) -> bool:
    return isinstance(configured.optim, AdamConfig) and not isinstance(configured.strategy, FSDPConfig)


def _batches(config: MemoryConfig, data: Any, parts: Parts, device: torch.device) -> Callable[[int], Any]:
    """Makes micro-batches of the costliest samples there are: the longest, where the dataset says its lengths."""
    lengths = getattr(data, "lengths", None)
    order = sorted(range(len(data)), key=lambda index: -int(lengths[index])) if lengths is not None else None
    collate = collate_fn(config.data) or getattr(data, "collate_fn", None) or PadCollate()

    def batch_of(samples: int) -> Any:
        chosen = [data[order[number] if order else number] for number in range(samples)]
        return to_device(collate(chosen), device, float_dtype=parts.precision.input_dtype)

    return batch_of


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
