"""The typed configuration of a training run: its names are the public contract.

Plain dataclasses that import neither torch nor Hydra. Each field is followed by a docstring; the tables of
docs/configuration.md are made from them. What one section can check by itself it checks in `__post_init__`; what
needs the world size or the data is checked where those are known.

A *component* (a model, a dataset, a task, an optimizer, an observer) is named by `_target_`, the import path of a class
or function, and the other keys of its section are passed to it. The typed sections of the built-in components are in
`distaccum.config.components`; anybody's own takes their place.
"""

from __future__ import annotations

from distaccum.config.basics import MISSING, as_plain, flat, require_name
from distaccum.config.batch import BatchConfig, ByLengthBatchConfig, DataConfig, PackedBatchConfig
from distaccum.config.loop import (
    CheckpointConfig,
    DecayScheduleConfig,
    EarlyStoppingConfig,
    EmaConfig,
    InsightConfig,
    LoopConfig,
    OptimConfig,
    PolynomialScheduleConfig,
    ScheduleConfig,
    StepScheduleConfig,
    SwaConfig,
    WSDScheduleConfig,
)
from distaccum.config.placement import (
    DDPConfig,
    DPConfig,
    Fp16Config,
    FSDPConfig,
    PrecisionConfig,
    SingleConfig,
    StrategyConfig,
)
from distaccum.config.run import DistributedConfig, TrainConfig, WandbConfig, conf_dir

__all__ = [
    "MISSING",
    "BatchConfig",
    "ByLengthBatchConfig",
    "CheckpointConfig",
    "DDPConfig",
    "DPConfig",
    "DataConfig",
    "DecayScheduleConfig",
    "DistributedConfig",
    "EarlyStoppingConfig",
    "EmaConfig",
    "FSDPConfig",
    "Fp16Config",
    "InsightConfig",
    "LoopConfig",
    "OptimConfig",
    "PackedBatchConfig",
    "PolynomialScheduleConfig",
    "PrecisionConfig",
    "ScheduleConfig",
    "SingleConfig",
    "StepScheduleConfig",
    "StrategyConfig",
    "SwaConfig",
    "TrainConfig",
    "WSDScheduleConfig",
    "WandbConfig",
    "as_plain",
    "conf_dir",
    "flat",
    "require_name",
]
