"""The runs of a study: a batch size and a learning rate each."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from distaccum.config import (
    BatchConfig,
    ByLengthBatchConfig,
    DDPConfig,
    EmaConfig,
    InsightConfig,
    ScheduleConfig,
    SingleConfig,
    StepScheduleConfig,
    StrategyConfig,
    SwaConfig,
    TrainConfig,
)
from distaccum.config.enums import Compression, LrRule
from distaccum.config.tools import StudyConfig
from distaccum.errors import UserError
from distaccum.tasks import CoupledTask
from distaccum.training.optim import LR_POWERS

_FACTORS = (1 / 16, 1 / 4, 1.0, 4.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run of a study."""

    batch_size: int
    rules: tuple[LrRule, ...]
    """All rules that give this learning rate; at the configured batch size, every rule does."""
    lr: float

    @property
    def name(self) -> str:
        """The name of its folder: `b00064-linear`."""
        return f"b{self.batch_size:05d}-{self.rules[0].name if len(self.rules) == 1 else 'base'}"

    @property
    def title(self) -> str:
        """`64, linear (lr 0.0005)`"""
        rule = " and ".join(rule.name for rule in self.rules)
        return f"{self.batch_size}, {rule} (lr {self.lr:.3g})"


def points_of(config: StudyConfig, num_samples: int) -> list[Point]:
    """Returns the runs of a study, from small batches to large ones.

    Args:
        num_samples: of the training data.

    Raises:
        UserError: a batch size is larger than the data.
    """
    points = []
    base, peak = _base_size(config), learning_rate(config.optim)
    for size in sorted(batch_sizes(config, num_samples)):
        rates: dict[float, list[LrRule]] = {}
        for rule in config.study.lr_rules:
            rates.setdefault(peak * (size / base) ** LR_POWERS[rule], []).append(rule)
        points += [Point(batch_size=size, rules=tuple(rules), lr=lr) for lr, rules in rates.items()]
    return points


def _base_size(config: StudyConfig) -> int:
    assert config.batch.global_batch_size is not None, "a study is not composed without one"
    return config.batch.global_batch_size


def batch_sizes(config: StudyConfig, num_samples: int) -> list[int]:
    """Returns the batch sizes that are asked for, or those that follow from the configured one."""
    if config.study.batch_sizes is not None:
        for size in config.study.batch_sizes:
            if size > num_samples:
                raise UserError(
                    f"study.batch_sizes={config.study.batch_sizes}: {size} is more than the {num_samples} samples of "
                    "the training data, and every window has to have its full size."
                )
        return config.study.batch_sizes
    sizes = {round(_base_size(config) * factor) for factor in _FACTORS}
    sizes = {size for size in sizes if 1 <= size <= num_samples}
    if len(sizes) < 2:
        raise UserError(
            f"batch.global_batch_size={_base_size(config)} and {num_samples} training samples leave no batch sizes to "
            "try: name them with study.batch_sizes=[…]."
        )
    return sorted(sizes)


def learning_rate(optim: Any) -> float:
    """Returns `optim.lr` of a built-in optimizer or of the user's own.

    Raises:
        UserError: it has none.
    """
    value = optim.get("lr") if isinstance(optim, dict) else getattr(optim, "lr", None)
    if not isinstance(value, int | float):
        raise UserError("study scales optim.lr with the batch size, and there is none: give optim.lr.")
    return float(value)


def max_samples(config: StudyConfig, num_samples: int) -> int:
    """Returns the number of samples after which a run ends."""
    if config.study.max_samples is not None:
        return config.study.max_samples
    limits = []
    if config.train.epochs is not None:
        limits.append(config.train.epochs * num_samples)
    if config.train.max_updates is not None:
        limits.append(config.train.max_updates * _base_size(config))
    return min(limits)


def measures_noise(config: StudyConfig, task: Any) -> bool:
    """Returns whether the runs of a study measure the noise scale.

    Args:
        task: as the configuration builds it.
    """
    if config.study.noise_scale is not None:
        return config.study.noise_scale
    is_compressed = isinstance(config.strategy, DDPConfig) and config.strategy.compression is Compression.powersgd
    return not (isinstance(config.batch, ByLengthBatchConfig) or is_compressed or isinstance(task, CoupledTask))


def configuration(
    point: Point, config: StudyConfig, num_samples: int, run_dir: str, *, noise_scale: bool = False
) -> TrainConfig:
    """Returns the training of a point: the user's, except for the batch size and what follows from it.

    What the configuration counts in updates (warm-up, steps of the schedule, the weights' averages) takes the same
    number of samples at each batch size. Every window has its full size.
    """
    of_samples = _base_size(config) / point.batch_size
    limit = max_samples(config, num_samples)
    updates = max(1, math.ceil(limit / point.batch_size))
    every = max(1, round(limit / config.study.evaluations / point.batch_size))
    values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(TrainConfig)}
    values |= {
        "run_dir": run_dir,
        "resume": "auto",
        "batch": _batch(config.batch, point.batch_size),
        "insight": _insight(config.insight, noise_scale, updates),
        "optim": _with_lr(config.optim, point.lr),
        "schedule": _schedule(config.schedule, of_samples, updates),
        "strategy": _strategy(config.strategy, config.study.ranks),
        "train": dataclasses.replace(
            config.train,
            epochs=None,
            ema=_not_after(updates, ema_of(config.train.ema, of_samples)),
            swa=_not_after(updates, swa_of(config.train.swa, of_samples)),
            max_updates=updates,
            eval_every=every if config.data.evaluation is not None else None,
        ),
    }
    return TrainConfig(**values)


def _batch(batch: BatchConfig, size: int) -> BatchConfig:
    micro = batch.micro_batch_size
    return dataclasses.replace(
        batch, global_batch_size=size, micro_batch_size=None if micro is None else min(micro, size), drop_last=True
    )


def _with_lr(optim: Any, lr: float) -> Any:
    return {**optim, "lr": lr} if isinstance(optim, dict) else dataclasses.replace(optim, lr=lr)


def _schedule(schedule: ScheduleConfig, of_samples: float, updates: int) -> ScheduleConfig:
    changes: dict[str, Any] = {}
    if schedule.warmup_updates:
        # The schedule must be longer than its warm-up.
        changes["warmup_updates"] = min(max(1, round(schedule.warmup_updates * of_samples)), max(0, updates - 1))
    if isinstance(schedule, StepScheduleConfig):
        changes["every_updates"] = max(1, round(schedule.every_updates * of_samples))
    return dataclasses.replace(schedule, **changes)


_MEASUREMENTS = 16
"""The least number of measurements of the noise scale in a run: large batches have few updates."""


def _insight(insight: InsightConfig, noise_scale: bool, updates: int) -> InsightConfig:
    every = min(insight.every_updates, max(1, updates // _MEASUREMENTS))
    return dataclasses.replace(insight, noise_scale=noise_scale or insight.noise_scale, every_updates=every)


def ema_of(ema: EmaConfig, of_samples: float) -> EmaConfig:
    """Returns the average with the same memory in samples.

    Args:
        of_samples: updates of this batch size for each of the configured one.
    """
    if ema.decay is None:
        return ema
    first = max(1, round(ema.first_update * of_samples))
    return dataclasses.replace(ema, decay=ema.decay ** (1 / of_samples), first_update=first)


def swa_of(swa: SwaConfig, of_samples: float) -> SwaConfig:
    """Returns the average of weights that are as many samples apart."""
    if swa.first_update is None:
        return swa
    return dataclasses.replace(
        swa,
        first_update=max(1, round(swa.first_update * of_samples)),
        every_updates=max(1, round(swa.every_updates * of_samples)),
    )


Average = TypeVar("Average", EmaConfig, SwaConfig)


def _not_after(updates: int, average: Average) -> Average:
    """Has an average begin at the last update of the run at the latest."""
    if average.first_update is None:
        return average
    return dataclasses.replace(average, first_update=min(updates, average.first_update))


def _strategy(strategy: StrategyConfig, ranks: int) -> StrategyConfig:
    """Returns the configured strategy; DDP for several ranks that are given none."""
    return DDPConfig() if ranks > 1 and isinstance(strategy, SingleConfig) else strategy
