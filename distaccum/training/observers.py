"""Builds the observers of a run, and hands the model to those that use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distaccum.checkpoints import Checkpoint
from distaccum.config import TrainConfig
from distaccum.config import instantiate as targets
from distaccum.config.enums import WandbMode
from distaccum.errors import UserError
from distaccum.observers import EvaluationRecord, MetricsFile, Observer, Progress, Wandb
from distaccum.observers.run_file import RunFile
from distaccum.runtime.devices import Precision
from distaccum.runtime.randomness import GlobalStates, derived_seed, seed_everything
from distaccum.strategies import Strategy
from distaccum.training.model import evaluation_mode
from distaccum.training.run_folder import RunFolder


def build_observers(
    config: TrainConfig, folder: RunFolder, checkpoint: Checkpoint | None, *, is_main: bool
) -> tuple[list[Observer], list[Observer]]:
    """Returns the observers that get reports, none but on rank 0, and those that use the model, on every rank.

    Raises:
        UserError: one can't be built.
    """
    observers = _ready_made(config, folder, checkpoint) if is_main else []
    of_model: list[Observer] = []
    for name, section in config.observers.items():
        where = f"observers.{name}"
        is_of_model = _uses_model(targets.locate(targets.arguments_of(section, where)[targets.TARGET], where))
        if not (is_main or is_of_model):
            continue
        observer = targets.build(section, where)
        if not isinstance(observer, Observer):
            raise UserError(f"{where} built a {type(observer).__name__}, not a distaccum.observers.Observer.")
        if _uses_model(type(observer)) != is_of_model:
            raise UserError(
                f"{where} built a {type(observer).__name__}, which uses the model (on_model) and so must be built on "
                f"every rank: let {where}._target_ name the class itself."
            )
        if is_main:
            observers.append(observer)
        if is_of_model:
            of_model.append(observer)
    return observers, of_model


def _uses_model(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, Observer) and target.on_model is not Observer.on_model


def _ready_made(config: TrainConfig, folder: RunFolder, checkpoint: Checkpoint | None) -> list[Observer]:
    run_dir = folder.path
    source = checkpoint.path.parent.parent if checkpoint is not None else None
    metrics_file = MetricsFile(run_dir, continues=folder.is_restart, start_from=source)
    observers: list[Observer] = [Progress(), metrics_file, RunFile(run_dir)]
    if config.wandb.mode is not WandbMode.disabled:
        wandb = config.wandb
        observers.append(Wandb(run_dir, wandb.mode, wandb.project, wandb.name or run_dir.name, wandb.tags))
    return observers


def show_model(
    observers: Sequence[Observer], strategy: Strategy, precision: Precision, record: EvaluationRecord, seed: int
) -> None:
    """Calls `on_model` of observers, on all ranks alike.

    All draw the same random numbers, so that ranks that sample take equally many forwards; those of the run are put
    back.
    """
    for observer in observers:
        strategy.at_rest()  # parameters in one form, whatever forwards came before
        with GlobalStates.now(strategy.device), evaluation_mode(strategy.module), torch.no_grad(), precision.autocast():
            seed_everything(derived_seed(seed, "observers", record.update))
            observer.on_model(strategy.module, strategy.device, record)
