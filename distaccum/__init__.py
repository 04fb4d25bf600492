"""distaccum: distributed training whose update is exactly the large-batch update, however the batch is cut.

The names below are imported when they are first used, so that `import distaccum` and `--help` don't import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distaccum.accumulation import Accumulator
    from distaccum.accumulation.gradient_caching import accumulate_coupled
    from distaccum.accumulation.noise_scale import NoiseScale
    from distaccum.accumulation.recovery import Recovery
    from distaccum.accumulation.result import LossTerm, UpdateResult
    from distaccum.checkpoints import Checkpointer
    from distaccum.config import CheckpointConfig, LoopConfig
    from distaccum.config.compose import compose
    from distaccum.errors import UserError
    from distaccum.loaders import EvaluationLoader, LoaderOptions, Window, WindowLoader
    from distaccum.models.ensemble import Ensemble
    from distaccum.observers import Observer
    from distaccum.planning import BatchPlan, Cut, resolve_batch, shuffled, split_evenly, window_bounds
    from distaccum.runtime.version import __version__ as __version__
    from distaccum.tasks import CoupledTask, SumsTask, Task, TaskOutput
    from distaccum.training.evaluation import evaluate_model
    from distaccum.training.trainer import Trainer

_NAMES = {
    "accumulation": "Accumulator LossTerm NoiseScale Recovery UpdateResult accumulate_coupled",
    "checkpoints": "Checkpointer",
    "config": "CheckpointConfig LoopConfig",
    "config.compose": "compose",
    "errors": "UserError",
    "loaders": "EvaluationLoader LoaderOptions Window WindowLoader",
    "models.ensemble": "Ensemble",
    "observers": "Observer",
    "planning": "BatchPlan Cut resolve_batch shuffled split_evenly window_bounds",
    "runtime.version": "__version__",
    "tasks": "CoupledTask SumsTask Task TaskOutput",
    "training.evaluation": "evaluate_model",
    "training.trainer": "Trainer",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = [
    "Accumulator",
    "BatchPlan",
    "CheckpointConfig",
    "Checkpointer",
    "CoupledTask",
    "Cut",
    "Ensemble",
    "EvaluationLoader",
    "LoaderOptions",
    "LoopConfig",
    "LossTerm",
    "NoiseScale",
    "Observer",
    "Recovery",
    "SumsTask",
    "Task",
    "TaskOutput",
    "Trainer",
    "UpdateResult",
    "UserError",
    "Window",
    "WindowLoader",
    "accumulate_coupled",
    "compose",
    "evaluate_model",
    "resolve_batch",
    "shuffled",
    "split_evenly",
    "window_bounds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
