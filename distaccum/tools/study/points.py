"""The runs of a study: a batch size and a learning rate each."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from distaccum.config import ByLengthBatchConfig, DDPConfig, SingleConfig, TrainConfig, as_plain, flat
from distaccum.config.enums import Compression, LrRule
from distaccum.config.optimizers import LBFGSConfig
from distaccum.config.tools import StudyConfig
from distaccum.errors import UserError
from distaccum.tasks import CoupledTask
from distaccum.training.optim import RULE_POWERS

_FACTORS = (1 / 16, 1 / 4, 1.0, 4.0)
_MEASUREMENTS = 16
"""The least number of measurements of the noise scale in a run: large batches have few updates."""


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
    if any(rule is not LrRule.none for rule in config.study.lr_rules):
        _require_one_rate(config.optim)
    for size in sorted(batch_sizes(config, num_samples)):
        rates: dict[float, list[LrRule]] = {}
        for rule in config.study.lr_rules:
            rates.setdefault(peak * (size / base) ** RULE_POWERS[rule], []).append(rule)
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


def _require_one_rate(optim: Any) -> None:
    groups = (optim.get("groups") if isinstance(optim, dict) else optim.groups) or []
    for number, entry in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(entry, dict) and "lr" in entry:
            raise UserError(
                f"study scales optim.lr with the batch size, and optim.groups[{number}] has an lr of its own "
                f"({entry['lr']}), which would stay. Leave that out (optim.layer_decay scales with optim.lr), or set "
                "study.lr_rules=[none]."
            )


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
    is_by_length, has_many_gradients = (
        isinstance(config.batch, ByLengthBatchConfig),
        isinstance(config.optim, LBFGSConfig),
    )
    return not (is_by_length or has_many_gradients or is_compressed or isinstance(task, CoupledTask))


def configuration(
    point: Point, config: StudyConfig, num_samples: int, run_dir: str, *, noise_scale: bool = False
) -> TrainConfig:
    """Returns the training of a point: the user's, except for the batch size and what follows from it.

    Every window has its full size.
    """
    limit = max_samples(config, num_samples)
    updates = max(1, math.ceil(limit / point.batch_size))
    every = max(1, round(limit / config.study.evaluations / point.batch_size))
    # The schedule must be longer than its warm-up, and an average begins at the last update at the latest.
    most = {"schedule.warmup_updates": max(0, updates - 1)}
    most |= {"train.ema.first_update": updates, "train.swa.first_update": updates}
    scaled = scaled_settings(flat(as_plain(config)), point.batch_size)
    values: dict[str, Any] = {key: min(value, most.get(key, value)) for key, value in scaled.items()}
    values |= {
        "run_dir": run_dir,
        "resume": "auto",
        "batch.global_batch_size": point.batch_size,
        "batch.drop_last": True,
        "insight.noise_scale": noise_scale or config.insight.noise_scale,
        "insight.every_updates": min(config.insight.every_updates, max(1, updates // _MEASUREMENTS)),
        "optim.lr": point.lr,
        "train.epochs": None,
        "train.max_updates": updates,
        "train.eval_every": every if config.data.evaluation is not None else None,
    }
    if config.study.ranks > 1 and isinstance(config.strategy, SingleConfig):
        values["strategy"] = DDPConfig()
    training = TrainConfig(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(TrainConfig)})
    changed: TrainConfig = _changed(training, values)
    return changed


def scaled_settings(configured: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Returns the settings that follow from a batch size: what is counted in updates takes the same number of samples,
    the weights' average remembers as many, and no micro-batch is larger than the window.

    Args:
        configured: the values of the configuration by their full keys.
    """
    ratio = configured["batch.global_batch_size"] / batch_size
    found: dict[str, Any] = {}
    if micro_batch_size := configured["batch.micro_batch_size"]:
        found["batch.micro_batch_size"] = min(micro_batch_size, batch_size)
    counts = ["schedule.warmup_updates", "schedule.every_updates"]
    if (decay := configured["train.ema.decay"]) is not None:
        found["train.ema.decay"] = decay ** (1 / ratio)
        counts.append("train.ema.first_update")
    if configured["train.swa.first_update"] is not None:
        counts += ["train.swa.first_update", "train.swa.every_updates"]
    if "schedule._target_" in configured:  # its keys mean what it likes, and it is told the number of updates
        counts = [key for key in counts if not key.startswith("schedule.")]
    found |= {key: max(1, round(configured[key] * ratio)) for key in counts if configured.get(key)}
    return found


def _changed(section: Any, changes: dict[str, Any]) -> Any:
    """Returns a section, a dataclass or a dictionary, with other values by their keys (`ema.decay`), checked once."""
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        inner.setdefault(name, {})[rest] = value
    entries = section if isinstance(section, dict) else {name: getattr(section, name) for name in inner}
    values = {name: new[""] if "" in new else _changed(entries[name], new) for name, new in inner.items()}
    return {**section, **values} if isinstance(section, dict) else dataclasses.replace(section, **values)
