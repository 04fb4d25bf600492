"""Measures the memory of the configured setting, and of others that differ from it by one change."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch.nn.modules.batchnorm import _BatchNorm

from distaccum.config import DDPConfig, DPConfig, FSDPConfig, StrategyConfig
from distaccum.config.enums import Accumulate, Compression, PrecisionName
from distaccum.config.launcher import launch
from distaccum.config.optimizers import NEED_ALL_STATE, NEED_WHOLE_PARAMETERS, AdamConfig, AdamW8bitConfig
from distaccum.config.tools import MemoryConfig
from distaccum.errors import UserError, is_one_value_per_channel
from distaccum.loaders.collate import PadCollate
from distaccum.planning import resolve_batch
from distaccum.planning.lengths import longest_samples
from distaccum.runtime.devices import resolve_device
from distaccum.runtime.logs import print_error
from distaccum.runtime.memory import is_out_of_memory
from distaccum.runtime.nested import to_device
from distaccum.strategies import needs_equal_micro_steps, shards_optimizer
from distaccum.strategies.blocks import blocks_of
from distaccum.tasks import CoupledTask
from distaccum.tasks.chunked_loss import head_of
from distaccum.tools.bench.placing import half_of, placed
from distaccum.tools.bench.terminal import status_line
from distaccum.tools.memory.lines import sizes_to_measure
from distaccum.tools.memory.measuring import Setting, measure, replicas_of
from distaccum.tools.memory.report import Report, Row
from distaccum.training.build import Parts
from distaccum.training.data import collate_fn
from distaccum.training.model import take_back_checkpointing
from distaccum.training.optim import has_8bit

_WHOLE: dict[str, Any] = {"reshard_in_window": True, "accumulate": Accumulate.whole, "shard_size": None}
_OTHER_PLACEMENTS: list[tuple[type[StrategyConfig], dict[str, Any]]] = [
    (DDPConfig, {"shard_optimizer": False}),
    (DDPConfig, {"shard_optimizer": True}),
    (FSDPConfig, _WHOLE),
    (FSDPConfig, {**_WHOLE, "reshard_in_window": False}),
    (FSDPConfig, {**_WHOLE, "accumulate": Accumulate.sharded}),
    (FSDPConfig, {**_WHOLE, "accumulate": Accumulate.node}),
]


class DoesNotFitError(UserError):
    """Memory has run out at the smallest micro-batch that was tried under the configured setting."""


def memory(config: MemoryConfig) -> int:
    """Measures, prints the report, and returns the exit status: 0 if the configured setting fits.

    Raises:
        UserError: the configuration, the data or the machine doesn't allow the measurement.
    """
    if launch().world_size > 1:
        raise UserError("distaccum.memory is one process: start it without torchrun, and set memory.world_size=…")
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
        DoesNotFitError: memory runs out at the smallest micro-batch of the configured setting.
        UserError: as `memory`.
    """
    return _Examination(config).report()


class _Change(NamedTuple):
    """A setting to measure beside the configured one."""

    overrides: str
    label: str
    setting: Setting
    task: Any = None
    """In the place of the configured one."""


class _Examination:
    """The parts that the configuration names, built, and the settings to measure it under."""

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._device = resolve_device(config.device)
        world_size = _ranks(config) if isinstance(config.strategy, DDPConfig | FSDPConfig) else 1
        self._parts = Parts(config, self._device, world_size=world_size)
        is_checkpointed = take_back_checkpointing(self._parts.module)
        if isinstance(self._parts.task, CoupledTask):
            raise UserError(
                f"distaccum.memory does not support {type(self._parts.task).__name__}, whose loss couples the samples "
                "of a window: its micro-steps are others. Train for a few updates: the summary shows the peak."
            )
        self._window = self._parts.loader.plan.global_batch_size
        strategy = _measurable(config.strategy)
        steps, self._micro_batch = self._cut(strategy, world_size)
        self._configured = Setting(
            strategy=strategy,
            world_size=world_size,
            accumulation_steps=steps,
            optim=config.optim,
            activation_checkpointing=is_checkpointed,
            device=self._device,
            precision=self._parts.precision,
            clip_norm=config.train.clip_norm,
            clip_value=config.train.clip_value,
            wrap=getattr(config.strategy, "wrap", ()),
            averages=config.train.averages,
            evaluation_batch_of=self._evaluation_batches(),
        )
        self._limit = config.memory.limit_gb * 2**30 if config.memory.limit_gb else _memory_of(self._device)
        self._usable = self._limit * (1 - config.memory.headroom)
        self._left_out: list[str] = []

    def report(self) -> Report:
        """Measures all settings."""
        return Report(
            model=type(self._parts.module).__name__,
            device=str(self._device),
            precision=self._config.precision.name.value,
            limit=int(self._limit),
            usable=int(self._usable),
            share=-(-self._window // self._configured.world_size),
            rows=self._rows(),
            left_out=self._left_out,
            can_install_8bit=self._config.memory.alternatives and _can_be_8bit(self._configured) and not has_8bit(),
        )

    def _rows(self) -> list[Row]:
        """Measures the settings one after the other; names those that can't be measured in `_left_out`."""
        changes = [_Change("", "configured", self._configured)]
        if self._config.memory.alternatives:
            changes += self._alternatives()
        rows: list[Row] = []
        with status_line("measuring", is_shown=not self._config.memory.json) as tell:
            for change in changes:
                tell(change.label)
                try:
                    rows.append(self._measured(change))
                except Exception as error:
                    is_full = is_out_of_memory(error)
                    if not rows or not (is_full or isinstance(error, UserError)):
                        raise
                    reason = "memory ran out" if is_full else str(error).partition(". ")[0]
                    self._left_out.append(f"{change.label} ({reason})")
        return rows

    def _measured(self, change: _Change) -> Row:
        setting, num_samples = change.setting, len(self._parts.train_data)
        steps, size = setting.accumulation_steps, self._micro_batch
        if (steps, setting.world_size) != (self._configured.accumulation_steps, self._configured.world_size):
            size = -(-self._window // (setting.world_size * steps))
        size = min(size, num_samples)
        replicas = replicas_of(setting.strategy, self._device)
        # With a single sample for each replica, kernels take other temporaries than with more, and BatchNorm refuses.
        is_alone_different = replicas > 1 or any(isinstance(part, _BatchNorm) for part in self._parts.module.modules())
        sizes = sizes_to_measure(size, num_samples, least=2 * replicas if is_alone_different else 1)
        try:
            footprint = measure(
                self._parts.module,
                setting,
                change.task or self._parts.task,
                self._batches(self._parts.train_data),
                sizes,
                limit=self._usable,
            )
        except Exception as error:
            if is_one_value_per_channel(error):
                raise UserError(
                    f"micro-batches of {sizes[0]} can't be measured: BatchNorm needs more than one value per channel "
                    "in training. Give each replica 2 samples or more (batch.micro_batch_size, "
                    "batch.global_batch_size, or more data), or use GroupNorm or LayerNorm."
                ) from error
            if setting is not self._configured or not is_out_of_memory(error):
                raise
            raise DoesNotFitError(
                f"it does not fit: memory ran out on {self._device} with micro-batches of {sizes[0]}, the smallest "
                "that was tried. Lower batch.micro_batch_size, or take a smaller model, precision=bf16, "
                "model.activation_checkpointing=true, or strategy=fsdp on several devices."
            ) from error
        row = Row(change.label, change.overrides, setting.world_size, steps, size, footprint)
        if isinstance(setting.strategy, FSDPConfig) and setting.strategy.reshard_in_window:
            return replace(row, accumulate=setting.strategy.accumulate.value)
        return row

    def _alternatives(self) -> Iterator[_Change]:
        """One change of the configured setting at a time."""
        config, configured = self._config, self._configured
        share = -(-self._window // configured.world_size)
        steps = configured.accumulation_steps
        for other in (1, min(share, 2 * steps)) if steps > 1 else (min(share, 2),):
            if other != steps:
                overrides = f"batch.micro_batch_size=null batch.accumulation_steps={other}"
                yield _Change(overrides, f"K = {other}", replace(configured, accumulation_steps=other))
        if has_8bit() and _can_be_8bit(configured):
            yield _Change("optim=adamw8bit", "8-bit AdamW", replace(configured, optim=AdamW8bitConfig()))
        if (task := self._task_in_chunks()) is not None:
            yield _Change("task.chunked_loss=true", "loss in chunks", configured, task)
        if blocks_of(self._parts.module, configured.wrap):
            on = not configured.activation_checkpointing
            label = f"activation checkpointing {'on' if on else 'off'}"
            setting = replace(configured, activation_checkpointing=on)
            yield _Change(f"model.activation_checkpointing={str(on).lower()}", label, setting)
        ranks = configured.world_size
        if ranks == 1:
            ranks = _ranks(config)
        needs_whole = isinstance(config.optim, NEED_WHOLE_PARAMETERS)
        for kind, settings in _OTHER_PLACEMENTS:
            if settings.get("accumulate") is Accumulate.node:
                if ranks == 1:
                    continue
                settings = {**settings, "shard_size": _ranks_of_a_node(configured.strategy, ranks)}
            strategy, words = placed(configured.strategy, kind, settings)
            overrides = " ".join(words)
            is_impossible = (
                needs_whole if isinstance(strategy, FSDPConfig) else config.precision.name is PrecisionName.bf16_params
            )
            is_impossible |= shards_optimizer(strategy) and isinstance(config.optim, NEED_ALL_STATE)
            if strategy == configured.strategy or is_impossible:
                continue
            label = f"{overrides.replace('strategy.', '').replace('strategy=', '')}, {ranks} ranks"
            if self._window < ranks:
                self._left_out.append(f"{label} (a window of {self._window} has no sample for each rank)")
                continue
            other, _ = self._cut(strategy, ranks)
            setting = replace(configured, strategy=strategy, world_size=ranks, accumulation_steps=other)
            yield _Change(overrides, label, setting)

    def _task_in_chunks(self) -> Any:
        """Returns the task with its loss in chunks; None if it has none, or has it already, or not with this model."""
        task = copy.copy(self._parts.task)
        if getattr(task, "chunked_loss", True) or isinstance(self._config.strategy, DPConfig):
            return None
        with suppress(UserError):
            head_of(self._parts.module)
            task.chunked_loss = True
            return task
        return None

    def _cut(self, strategy: StrategyConfig, world_size: int) -> tuple[int, int]:
        """Micro-steps of rank 0 in a full window, and the samples of the largest of them."""
        batch = self._config.batch
        plan = resolve_batch(
            world_size=world_size,
            global_batch_size=self._window,
            micro_batch_size=batch.given_size,
            accumulation_steps=batch.accumulation_steps if batch.global_batch_size else None,
            equal_micro_steps=needs_equal_micro_steps(strategy),
        )
        sizes = plan.cut(self._window).sizes[0]
        return len(sizes), max(sizes)

    def _batches(self, data: Any) -> Callable[[int], Any]:
        """Makes micro-batches of the costliest samples there are: the longest, where the dataset says its lengths."""
        lengths = getattr(data, "lengths", None)
        collate = collate_fn(self._config.data) or getattr(data, "collate_fn", None) or PadCollate()

        def batch_of(samples: int) -> Any:
            numbers = longest_samples(lengths, samples) if lengths is not None else range(samples)
            chosen = [data[number] for number in numbers]
            return to_device(collate(chosen), self._device, float_dtype=self._parts.precision.input_dtype)

        return batch_of

    def _evaluation_batches(self) -> Callable[[int], Any] | None:
        data, fixed = self._parts.evaluation_data, self._config.train.eval_batch_size
        if data is None:
            return None
        batch_of = self._batches(data)
        return lambda micro_batch: batch_of(min(fixed or micro_batch, len(data)))


def _ranks(config: MemoryConfig) -> int:
    """Returns the number of ranks of placements that have several."""
    return config.memory.world_size or max(2, torch.cuda.device_count())


def _ranks_of_a_node(given: StrategyConfig, ranks: int) -> int:
    """Returns as many ranks as are configured for a node, or as this machine has GPUs, or half of all."""
    given_size, gpus = getattr(given, "shard_size", None), torch.cuda.device_count()
    if given_size and ranks % given_size == 0:
        return int(given_size)
    return gpus if gpus > 1 and ranks % gpus == 0 else half_of(ranks)


def _measurable(strategy: StrategyConfig) -> StrategyConfig:
    """The strategy without PowerSGD, whose factors need the other ranks; they are small beside the buckets.

    Raises:
        UserError: it depends on how many ranks a node has, which one process can't know.
    """
    if isinstance(strategy, FSDPConfig) and strategy.accumulate is Accumulate.node and strategy.shard_size is None:
        raise UserError(
            "strategy.accumulate=node takes the ranks of a node from the launcher, and distaccum.memory is started "
            "without one. Say how many there are: strategy.shard_size=8, for example."
        )
    if isinstance(strategy, DDPConfig) and strategy.compression is Compression.powersgd:
        return replace(strategy, compression=Compression.none)
    return strategy


def _can_be_8bit(configured: Setting) -> bool:
    return isinstance(configured.optim, AdamConfig) and not isinstance(configured.strategy, FSDPConfig)


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
