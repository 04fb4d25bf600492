"""Settings that change no update, as values, as overrides and as an experiment file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import yaml

from distaccum.config import BatchConfig, ByLengthBatchConfig, DDPConfig, SingleConfig, TrainConfig
from distaccum.config.enums import Balance
from distaccum.config.tools import TuneConfig
from distaccum.planning import resolve_batch
from distaccum.strategies import needs_equal_micro_steps

TuneSetting = Mapping[str, Any]
"""Key of the configuration → value. `batch` is the name of the cut; all others are dotted paths."""

CUT, MICRO_BATCH, STEPS = "batch", "batch.micro_batch_size", "batch.accumulation_steps"
MAX_TOKENS, BUCKET, WORKERS = "batch.max_tokens", "strategy.bucket_cap_mb", "data.num_workers"
CHECKPOINTING, COMPRESSION = "model.activation_checkpointing", "strategy.compression"
ACCUMULATE = "strategy.accumulate"
BY_LENGTH, UNIFORM = "by_length", "uniform"


def base_of(config: TuneConfig, world_size: int) -> TrainConfig:
    """Returns the training as it is configured, on a number of ranks."""
    is_alone = isinstance(config.strategy, SingleConfig) and world_size > 1
    strategy = DDPConfig() if is_alone else config.strategy
    # Shares by speed need many updates to become stable, and are the same for all candidates.
    batch = dataclasses.replace(config.batch, balance=Balance.even)
    return dataclasses.replace(config, strategy=strategy, batch=batch)


def applied(config: TrainConfig, setting: TuneSetting) -> TrainConfig:
    """Returns the configuration with a setting's values."""
    changed = dataclasses.replace(config)
    if CUT in setting:
        changed.batch = _with_cut(config.batch, setting[CUT])
    for key, value in setting.items():
        if key != CUT:
            section, _, name = key.partition(".")
            setattr(changed, section, _with(getattr(changed, section), name, value))
    return changed


def _with_cut(batch: BatchConfig, cut: str) -> BatchConfig:
    kind = ByLengthBatchConfig if cut == BY_LENGTH else BatchConfig
    kept = {entry.name: getattr(batch, entry.name) for entry in dataclasses.fields(BatchConfig)}
    if cut == BY_LENGTH:
        kept["accumulation_steps"] = None
    return kind(**kept)


def _with(section: Any, name: str, value: Any) -> Any:
    if isinstance(section, dict):
        return {**section, name: value}
    return dataclasses.replace(section, **{name: value})


def value_in(section: Any, name: str) -> Any:
    """Returns an entry of a section, which is a dataclass or a dictionary; None if there is none."""
    return section.get(name) if isinstance(section, dict) else getattr(section, name, None)


def micro_batch_of(config: TrainConfig, world_size: int) -> int:
    """Returns the samples of the largest micro-batch of a full window, cut uniformly.

    Raises:
        UserError: the batch numbers don't fit together.
    """
    plan = resolve_batch(
        world_size=world_size,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.given_size,
        accumulation_steps=config.batch.accumulation_steps,
        equal_micro_steps=needs_equal_micro_steps(config.strategy),
    )
    return max(size for sizes in plan.cut(plan.global_batch_size).sizes for size in sizes)


def with_micro_batch(config: TrainConfig, size: int) -> dict[str, Any]:
    """Returns the setting of a micro-batch size, with contradicting keys set to null."""
    setting: dict[str, Any] = {MICRO_BATCH: size}
    if config.batch.accumulation_steps is not None:
        setting[STEPS] = None
    if isinstance(config.batch, ByLengthBatchConfig) and config.batch.max_tokens is not None:
        setting[MAX_TOKENS] = None
    return setting


_ONLY_BY_LENGTH = {f"batch.{entry.name}" for entry in dataclasses.fields(ByLengthBatchConfig)} - {
    f"batch.{entry.name}" for entry in dataclasses.fields(BatchConfig)
}


def merged(setting: TuneSetting, changes: TuneSetting) -> dict[str, Any]:
    """Returns a setting with changes, without keys that its cut then doesn't have."""
    both = {**setting, **changes}
    return {key: value for key, value in both.items() if both.get(CUT) != UNIFORM or key not in _ONLY_BY_LENGTH}


def overrides_of(setting: TuneSetting) -> list[str]:
    """Returns a setting as words of a command line."""
    return [f"{key}={_shown(value)}" for key, value in setting.items()]


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.name)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):  # not by equality: 1 is equal to True
        return str(value).lower()
    return "null" if value is None else str(value)


def command_of(setting: TuneSetting, arguments: Sequence[str], world_size: int) -> list[str]:
    """Returns the words of the command that trains with a setting.

    Args:
        arguments: the tool's own, of which those of the training are kept.
    """
    changed = {*setting, "run_dir"}
    if setting.get(CUT) == UNIFORM:
        changed |= _ONLY_BY_LENGTH
    kept = [
        entry
        for entry in arguments
        if entry.lstrip("+").partition("=")[0] not in changed and not entry.lstrip("+").startswith("tune.")
    ]
    if world_size > 1:
        kept = [entry for entry in kept if entry != "strategy=single"]  # it was measured under DDP: see `base_of`
    launcher = ["python"] if world_size == 1 else ["torchrun", f"--nproc_per_node={world_size}"]
    return [*launcher, "-m", "distaccum.train", *kept, *overrides_of(setting)]


def experiment_of(setting: TuneSetting, base: str | None, comment: str) -> str:
    """Returns a setting as the text of an experiment's file.

    Args:
        base: name of the experiment that it was found for, which it includes; None for none.
    """
    defaults: list[Any] = [base] if base is not None else []
    if CUT in setting:
        defaults.append({"override /batch": setting[CUT]})
    content: dict[str, Any] = {}
    for key, value in setting.items():
        if key != CUT:
            section, _, name = key.partition(".")
            content.setdefault(section, {})[name] = value.name if isinstance(value, Enum) else value
    body = {**({"defaults": [*defaults, "_self_"]} if defaults else {}), **content}
    text = yaml.safe_dump(body, sort_keys=False, allow_unicode=True) if body else ""
    return f"# @package _global_\n# {comment}\n{text}"
