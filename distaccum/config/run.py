"""Configuration of a whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distaccum.config.basics import MISSING
from distaccum.config.batch import BatchConfig, ByLengthBatchConfig, DataConfig, PackedBatchConfig
from distaccum.config.enums import BatchSchedule, Compression, DeviceChoice, LrRule, Normalize, WandbMode
from distaccum.config.loop import CheckpointConfig, DecayScheduleConfig, InsightConfig, LoopConfig, ScheduleConfig
from distaccum.config.optimizers import RpropConfig, ScheduleFreeConfig, ScheduleFreeSGDConfig
from distaccum.config.placement import DDPConfig, DPConfig, PrecisionConfig, StrategyConfig
from distaccum.errors import require, require_at_least, require_positive


@dataclass(kw_only=True, slots=True)
class DistributedConfig:
    """Settings of how ranks wait for each other."""

    timeout_seconds: float = 600.0
    """How long ranks wait for a missing one. They then stop, and name it and what it was doing."""

    def __post_init__(self) -> None:
        require_positive(distributed__timeout_seconds=self.timeout_seconds)


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases, which is imported only when used."""

    mode: WandbMode = WandbMode.offline
    """`disabled`; `offline`: written to the run folder, for a later `wandb sync`; `online`: uploaded during the run."""
    project: str = "distaccum"
    """Name of the project."""
    name: str | None = None
    """Name of the run. `null`: the name of the run folder."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """A whole training run."""

    seed: int = 0
    """Seed of the windows, of the model's initialisation, of dropout and of random augmentation."""
    run_dir: str | None = None
    """Folder for everything that the run writes. `null`: a folder in `runs/` named by the time of the start."""
    resume: str = "auto"
    """`auto`: go on from the newest valid checkpoint in `run_dir`, if there is one; `none`: begin anew, in a folder
    without results; or a path to go on from: a checkpoint's, or a run folder's, whose newest one is taken."""
    resume_override: bool = False
    """Go on although the global batch, the seed or the training data are no longer those of the checkpoint."""
    device: DeviceChoice = DeviceChoice.auto
    """`cpu` or `cuda`; `auto`: CUDA if this host has a device."""
    compile: bool = False
    """Compile the model with `torch.compile`, under `fsdp` each block by itself. Updates stay equal within rounding.
    Updates during which something is compiled are reported apart, and don't count in the final samples/s."""
    compile_backend: str = "inductor"
    """Backend of `torch.compile`. `aot_eager` traces the model without generating code: a quick test of whether it can
    be compiled."""
    compile_dynamic: bool | None = None
    """`true`: compile once for all shapes; `false`: anew for each shape. `null`: `true` with `batch=by_length` and
    `batch=packed`; else for the first shape, and for all shapes when a second one comes."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = MISSING
    model: Any = MISSING
    task: Any = MISSING
    optim: Any = MISSING
    schedule: Any = MISSING
    strategy: StrategyConfig = MISSING
    precision: PrecisionConfig = MISSING
    train: LoopConfig = field(default_factory=LoopConfig)
    insight: InsightConfig = field(default_factory=InsightConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    observers: dict[str, Any] = field(default_factory=dict)
    """Observers of the run, besides those of progress, `metrics.jsonl` and wandb: `observers=[tensorboard,mlflow,csv]`
    chooses ready-made ones, `observers.NAME` adds a component."""

    def __post_init__(self) -> None:
        require_at_least(0, seed=self.seed)
        self._check_step_size()
        if isinstance(self.batch, PackedBatchConfig):
            self._check_packing()
        if self.batch.schedule is BatchSchedule.noise:
            require(
                self.insight.noise_scale,
                "batch.schedule=noise follows the noise scale, which is not measured: set insight.noise_scale=true.",
            )
            require(
                self.train.max_updates is not None or not self._schedule_needs_length(),
                f"schedule={_name(self.schedule)} follows from the number of the run's last update, and with "
                "batch.schedule=noise it can't be known how many there will be in train.epochs: set "
                "train.max_updates, or schedule=constant or step with schedule.warmup_ratio=null.",
            )
        if self.insight.noise_scale:
            require(
                not isinstance(self.batch, ByLengthBatchConfig),
                f"insight.noise_scale=true is not supported with batch={self.batch.cut}: the noise scale needs "
                "micro-batches that are random samples of the data. Set batch=uniform, or leave it out.",
            )
            require(
                not (isinstance(self.strategy, DDPConfig) and self.strategy.compression is Compression.powersgd),
                "insight.noise_scale=true is not supported with strategy.compression=powersgd, whose sum of gradients "
                "can't be compared with its parts. Leave one of them out.",
            )

    def _check_packing(self) -> None:
        require(
            not isinstance(self.strategy, DPConfig),
            "batch=packed is not supported with strategy=dp, which scatters the rows of a micro-batch over replicas, "
            "and a packed one is a single row. Set batch=by_length, or strategy=ddp under torchrun.",
        )
        require(
            self.data == MISSING or self.data.collate_fn is None,
            "batch=packed makes micro-batches itself, of samples put end to end, and data.collate_fn is given too. "
            "Leave it out (the dataset's own collate_fn serves the evaluations, its pack_fn the packing), or set "
            "batch=by_length.",
        )
        normalize = getattr(self.task, "normalize", None)
        require(
            normalize in (None, Normalize.tokens),
            f"batch=packed is not supported with task.normalize={getattr(normalize, 'name', normalize)}: in a packed "
            "micro-batch the loss of a sample is not told from that of the others. Set batch=by_length, or "
            "task.normalize=tokens.",
        )

    def _schedule_needs_length(self) -> bool:
        is_known = isinstance(self.schedule, ScheduleConfig) and not isinstance(self.schedule, DecayScheduleConfig)
        return not is_known or self.schedule.warmup_ratio is not None

    def _check_step_size(self) -> None:
        if isinstance(self.optim, RpropConfig):
            is_constant = type(self.schedule) is ScheduleConfig
            has_warmup = is_constant and (self.schedule.warmup_updates or self.schedule.warmup_ratio)
            require(
                is_constant and not has_warmup and self.batch.lr_rule is LrRule.none,
                "optim=rprop takes optim.lr for its first step alone, and then has step sizes of its own: a schedule, "
                "a warm-up or a rule for the learning rate would do nothing. Set schedule=constant "
                "schedule.warmup_updates=0 schedule.warmup_ratio=null batch.lr_rule=none.",
            )
        if isinstance(self.optim, ScheduleFreeConfig | ScheduleFreeSGDConfig):
            require(
                type(self.schedule) is ScheduleConfig,
                f"optim=schedule_free averages its weights in the place of a decaying learning rate, and schedule="
                f"{_name(self.schedule)} would make that average one of its early weights. Set "
                "schedule=constant; schedule.warmup_updates may stay.",
            )


def _name(schedule: Any) -> str:
    return str(getattr(schedule, "name", "custom"))


def conf_dir() -> Path:
    """Returns the folder of the Hydra groups: in the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
