"""From a configuration to a run: every part built, each by its own module, in the order that errors are cheapest."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from distaccum import targets
from distaccum.choices import WandbMode
from distaccum.config import DataConfig, Fp16Config, PrecisionConfig, TrainConfig
from distaccum.devices import Precision, resolve_device, resolve_precision
from distaccum.distributed import World, joined_world
from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader, LoaderOptions, WindowLoader
from distaccum.logs import logging_to
from distaccum.observers import MetricsFile, Observer, Progress, RunEnd, Wandb
from distaccum.optim import Schedule, build_optimizer, schedule_factor
from distaccum.seeding import derived_seed, seed_everything
from distaccum.strategies import needs_equal_forwards, needs_equal_micro_steps, place, shards_optimizer
from distaccum.trainer import Trainer, total_updates

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> RunEnd:
    """Runs a training from its configuration, in the ranks that the launcher has started.

    Raises:
        UserError: whatever in the configuration, the data or the machine keeps the run from going on.
    """
    with joined_world() as world:
        device = resolve_device(config.device, world.local_rank)
        world.init_process_group(device)
        plain = as_plain(config)
        check_same_config(world, plain)
        with world.together():
            made = make_run_dir(config.run_dir, plain) if world.is_main else None
        run_dir = world.from_main(made)
        assert run_dir is not None
        with world.together(), logging_to(run_dir, world.rank):
            pass  # every rank can write its log, or all stop here
        with logging_to(run_dir, world.rank):
            return build_trainer(config, world, device, run_dir, plain).fit()


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
        micro_batch_size=config.batch.micro_batch_size,
        accumulation_steps=config.batch.accumulation_steps,
        drop_last=config.batch.drop_last,
        seed=config.seed,
        collate_fn=_collate_fn(config.data),
        rank=rank,
        world_size=world_size,
        equal_micro_steps=needs_equal_micro_steps(config.strategy),
        options=options,
    )
    evaluation_data, evaluation_loader = _evaluation(config, options, rank, world_size)
    task = targets.build(config.task, "task")
    if not callable(task):
        raise UserError(f"task built a {type(task).__name__}, which can't be called.")
    module = targets.build(config.model, "model", defaults_from=train_data)
    if not isinstance(module, nn.Module):
        raise UserError(f"model built a {type(module).__name__}, not a torch.nn.Module.")
    return Parts(
        precision=precision,
        train_data=train_data,
        loader=loader,
        evaluation_data=evaluation_data,
        evaluation_loader=evaluation_loader,
        task=task,
        module=module.to(precision.parameter_dtype),
    )


def build_trainer(
    config: TrainConfig, world: World, device: torch.device, run_dir: Path, plain: dict[str, Any]
) -> Trainer:
    """Builds what a configuration names. What a rank can do alone comes before anything that ranks wait in."""
    with world.together():
        parts = build_parts(config, device, rank=world.rank, world_size=world.world_size)
        factor = schedule_factor(config.schedule, total_updates(config.train, len(parts.loader)))
        observers = _observers(config, run_dir) if world.is_main else []
    strategy = place(parts.module, config.strategy, device, config.precision.name)
    optimizer = build_optimizer(
        config.optim, strategy.model.parameters(), device, shard=shards_optimizer(config.strategy)
    )
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
        run_dir=run_dir,
        config=plain,
    )


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
    everyone = world.gather(_flat(plain))
    keys = sorted(set().union(*everyone))
    # As text, because NaN is not equal to itself.
    different = [key for key in keys if len({repr(flat.get(key)) for flat in everyone}) > 1]
    if different:
        shown = "; ".join(
            f"{key} is " + ", ".join(f"{flat.get(key)!r} on rank {rank}" for rank, flat in enumerate(everyone))
            for key in different[:5]
        )
        more = f"; and {len(different) - 5} more keys" if len(different) > 5 else ""
        raise UserError(f"the ranks were started with different configurations: {shown}{more}. Give all the same.")


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {
        path: leaf for name, entry in value.items() for path, leaf in _flat(entry, f"{key}.{name}".lstrip(".")).items()
    }


def make_run_dir(path: str | None, plain: dict[str, Any]) -> Path:
    """Makes the run folder, with `config.yaml` in it. To be called on one rank.

    Args:
        path: the folder, or None for a new one in `runs/`, named by the time.

    Raises:
        UserError: it holds the results of another run, or can't be written.
    """
    if path == "":
        raise UserError("run_dir is empty. Name a folder, or leave run_dir out for a new one in runs/.")
    run_dir = Path(path).expanduser() if path is not None else Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        if path is None:
            run_dir = _made_anew(run_dir)
        elif (run_dir / "metrics.jsonl").exists():
            # A config.yaml alone is what a run leaves that failed before its first update: no reason to refuse.
            raise UserError(
                f"run_dir={path} holds the results of another run, which would be overwritten. Choose another folder, "
                "or remove that one."
            )
        else:
            run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the run folder {run_dir} can't be written: {error.strerror or error}. Choose another with run_dir=…"
        ) from error
    return run_dir


def _made_anew(path: Path) -> Path:
    """Makes a folder that was not there: `path`, or `path` with a number behind it."""
    folder, number = path, 1
    while True:
        try:
            # Asking first whether it is there would let two runs that start at once take the same one.
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}_{number}")


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
        collate_fn=_collate_fn(config.data),
        rank=rank,
        world_size=world_size,
        options=options,
        equal_batches=needs_equal_forwards(config.strategy),
    )
    return data, loader


def _collate_fn(config: DataConfig) -> Any:
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


def _observers(config: TrainConfig, run_dir: Path) -> list[Observer]:
    observers: list[Observer] = [Progress(), MetricsFile(run_dir)]
    if config.wandb.mode is not WandbMode.disabled:
        wandb = config.wandb
        observers.append(Wandb(run_dir, wandb.mode, wandb.project, wandb.name or run_dir.name, wandb.tags))
    for name, section in config.observers.items():
        observer = targets.build(section, f"observers.{name}")
        if not isinstance(observer, Observer):
            raise UserError(f"observers.{name} built a {type(observer).__name__}, not a distaccum.observers.Observer.")
        observers.append(observer)
    return observers
