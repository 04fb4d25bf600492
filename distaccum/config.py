"""The typed configuration of a training run: its names are the public contract.

Plain dataclasses that import neither torch nor Hydra. Each field is followed by a docstring; the configuration
reference in the README is made from them. What one section can check by itself it checks in `__post_init__`; what
needs the world size or the data is checked where those are known.

A *component* (a model, a dataset, a task, an optimizer, an observer) is named by `_target_`, the import path of a class
or function, and the other keys of its section are passed to it. The typed sections of the built-in components are in
`distaccum.components`; anybody's own takes their place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distaccum.choices import Balance, Compression, DeviceChoice, Goal, OnNonfinite, PrecisionName, WandbMode
from distaccum.errors import require, require_at_least, require_positive

MISSING: Any = "???"
"""OmegaConf's mark for a value that must be given (the same string as `omegaconf.MISSING`)."""


def require_name(group: str, name: str, *own: str) -> None:
    """A section's name says which option of its group it is: it can't become another by being renamed."""
    require(
        name in own, f"{group}.name={name} can't be set: it follows from the choice of {group}. Set {group}={name}."
    )


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """How many samples one update is made of, and how they are cut. See `distaccum.planning.resolve_batch`."""

    global_batch_size: int | None = 256
    """Samples per update, over all ranks. `null` if micro-batch size and accumulation steps are given instead."""
    micro_batch_size: int | None = None
    """Largest number of samples in one forward and backward on one rank. `null`: follows from the accumulation steps;
    16 if those aren't given either."""
    accumulation_steps: int | None = None
    """Micro-steps per update and rank. `null`: as many as the micro-batch size asks for."""
    drop_last: bool = False
    """Leave out an epoch's last window when it is smaller than the global batch."""
    balance: Balance = Balance.even
    """`even`: ranks get equal shares of each window; `speed`: shares in proportion to their measured speed, so that
    unequal GPUs finish together."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            batch__global_batch_size=self.global_batch_size,
            batch__micro_batch_size=self.micro_batch_size,
            batch__accumulation_steps=self.accumulation_steps,
        )


@dataclass(kw_only=True, slots=True)
class ByLengthBatchConfig(BatchConfig):
    """Samples of like length share a micro-batch, within each window: little is padded, and the update is the same.

    The windows are those of `batch=uniform`, so sampling is exactly as random. Lengths are the dataset's attribute
    `lengths` (a number for each sample), or found once by loading every sample.
    """

    max_tokens: int | None = None
    """Most tokens in a micro-batch, padding included. `null`: `micro_batch_size` samples of the longest there is, which
    is what `batch=uniform` must have memory for."""
    measure_costs: bool = True
    """Fit what a micro-batch costs (linear and quadratic in its length, and a constant) to measured micro-steps, at
    updates 4, 16 and 64, and cut accordingly. `false`: a fixed guess, so that the same command gives the same bits."""

    def __post_init__(self) -> None:
        BatchConfig.__post_init__(self)
        require_at_least(1, batch__max_tokens=self.max_tokens)
        require(
            self.accumulation_steps is None,
            f"batch.accumulation_steps={self.accumulation_steps} can't be given with batch=by_length: the number of "
            "micro-steps follows from the lengths. Leave it out, or set batch=uniform.",
        )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Two datasets and how they are loaded. The datasets are any map-style `torch.utils.data.Dataset`."""

    train: Any = MISSING
    """Component: the dataset to train on. Attributes of it that bear the name of a model's argument (`num_classes`,
    `input_shape`, `vocab_size`, …) are passed to the model, unless the configuration gives that argument."""
    evaluation: Any = None
    """Component: the dataset of the evaluations. `null`: no evaluation."""
    collate_fn: Any = None
    """Component: a function that makes a micro-batch of a list of samples. `null`: the dataset's own `collate_fn`
    attribute, else stacking, with dynamic padding to the longest of the micro-batch."""
    num_workers: int = 0
    """Worker processes per rank that load samples. 0: the training process loads them itself."""
    pin_memory: bool | None = None
    """Load into page-locked memory, from where copies to the GPU are asynchronous. `null`: yes on CUDA."""
    persistent_workers: bool | None = None
    """Keep the workers between epochs. `null`: yes if there are any."""
    prefetch_factor: int | None = None
    """Micro-batches that each worker loads ahead. `null`: torch's own default, 2."""
    non_blocking: bool = True
    """Copy to the GPU without waiting; the next micro-batch is then copied while this one computes."""

    def __post_init__(self) -> None:
        require_at_least(0, data__num_workers=self.num_workers)
        require_at_least(1, data__prefetch_factor=self.prefetch_factor)
        for key in ("persistent_workers", "prefetch_factor"):
            require(
                not (getattr(self, key) and self.num_workers == 0),
                f"data.{key}={getattr(self, key)} needs worker processes, and data.num_workers is 0: "
                f"set data.num_workers, or leave data.{key} out.",
            )


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """In which floating-point format the model computes. Parameters are float32, unless said otherwise."""

    name: PrecisionName = PrecisionName.fp32
    """Set by the choice of the group. `fp32`; `bf16` or `fp16`: autocast; `bf16_params`: parameters in bfloat16
    themselves, gradients accumulated in float32; `fp64`: everything in double precision, for proofs."""

    def __post_init__(self) -> None:
        require_name("precision", self.name.name, *(entry.name for entry in PrecisionName if entry.name != "fp16"))


@dataclass(kw_only=True, slots=True)
class Fp16Config(PrecisionConfig):
    """Autocast to float16 with a gradient scaler, which steps, skips and adapts per update."""

    name: PrecisionName = PrecisionName.fp16
    init_scale: float = 65536.0
    """First loss scale."""
    growth_interval: int = 2000
    """Updates without an overflow after which the loss scale doubles."""

    def __post_init__(self) -> None:
        require_name("precision", self.name.name, "fp16")
        require_positive(precision__init_scale=self.init_scale, precision__growth_interval=self.growth_interval)


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """How the model is placed on devices."""

    name: str = MISSING
    """`single`, `dp`, `ddp` or `fsdp`. Without `strategy=…` on the command line: `ddp` under torchrun with more than
    one process, else `single`."""


@dataclass(kw_only=True, slots=True)
class SingleConfig(StrategyConfig):
    """One process, one device."""

    name: str = "single"

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "single")


@dataclass(kw_only=True, slots=True)
class DDPConfig(StrategyConfig):
    """One process per device, each with a whole model: `torch.nn.parallel.DistributedDataParallel`."""

    name: str = "ddp"
    bucket_cap_mb: float = 25.0
    """Size in MiB of the buckets in which gradients are all-reduced."""
    gradient_as_bucket_view: bool = True
    """Gradients live in the buckets: less memory and no copies."""
    find_unused_parameters: bool = False
    """Search the graph for parameters that took no part in the loss. Needed only if there are any."""
    static_graph: bool = False
    """Promise that the graph never changes. All ranks then take equal numbers of micro-steps, and the first micro-step
    of the run is synchronised too, which DDP needs and which changes no result."""
    broadcast_buffers: bool = True
    """Copy rank 0's buffers (BatchNorm statistics) to all ranks at the start of each window and before evaluations."""
    sync_batchnorm: bool = False
    """Replace BatchNorm by SyncBatchNorm, whose statistics run over the ranks' micro-batches of one micro-step. CUDA
    only."""
    shard_optimizer: bool = False
    """Each rank keeps the optimizer's state for a part of the parameters, and sends its part of the update to the
    others (ZeRO stage 1)."""
    compression: Compression = Compression.none
    """Gradients cross the network as `fp16`, `bf16` or low-rank factors (`powersgd`). The update is then no longer
    exact."""
    powersgd_rank: int = 1
    """Rank of PowerSGD's factors."""
    powersgd_start_update: int = 10
    """Updates that PowerSGD leaves uncompressed at the start (at least 2)."""

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "ddp")
        require_positive(strategy__bucket_cap_mb=self.bucket_cap_mb)
        require_at_least(1, strategy__powersgd_rank=self.powersgd_rank)
        require_at_least(2, strategy__powersgd_start_update=self.powersgd_start_update)


@dataclass(kw_only=True, slots=True)
class DPConfig(StrategyConfig):
    """One process, several replicas: `torch.nn.DataParallel` on two or more GPUs, threads on a CPU.

    Each micro-batch is scattered over the replicas, their outputs are gathered, and the loss is taken of them together.
    """

    name: str = "dp"
    replicas: int | None = None
    """Number of replicas. `null`: one per GPU, or two on a CPU."""

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "dp")
        require_at_least(1, strategy__replicas=self.replicas)


@dataclass(kw_only=True, slots=True)
class FSDPConfig(StrategyConfig):
    """One process per device, each with a shard of the model: FSDP2, `torch.distributed.fsdp.fully_shard`."""

    name: str = "fsdp"
    wrap: list[str] = field(default_factory=list)
    """Class names of the modules that are gathered and sharded as one. Empty: the members of each `ModuleList`, or the
    model's own children if it has none."""
    reshard_in_window: bool = True
    """Free gathered parameters after each forward and backward: least memory. `false`: keep them for the window's
    micro-steps, and gather once per update."""

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "fsdp")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimizer. A component: it is called with the parameters first, then with the keys of this section."""

    _target_: str = MISSING
    """Import path of the optimizer."""
    lr: float = MISSING
    """Peak learning rate; `schedule` multiplies it by a factor for each update."""


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate as a factor of `optim.lr`; a function of the update's number and of nothing else."""

    name: str = "constant"
    """`constant`, `linear`, `cosine` or `step`."""
    warmup_updates: int = 0
    """Updates over which the factor rises linearly to 1."""

    def __post_init__(self) -> None:
        require_name("schedule", self.name, *self._own_names)
        require_at_least(0, schedule__warmup_updates=self.warmup_updates)

    @property
    def _own_names(self) -> tuple[str, ...]:
        return ("constant",)


@dataclass(kw_only=True, slots=True)
class DecayScheduleConfig(ScheduleConfig):
    """`linear` or `cosine` decay from the end of the warm-up to the last update of the run."""

    final_factor: float = 0.0
    """The factor at the last update."""

    def __post_init__(self) -> None:
        ScheduleConfig.__post_init__(self)
        require_at_least(0, schedule__final_factor=self.final_factor)

    @property
    def _own_names(self) -> tuple[str, ...]:
        return ("linear", "cosine")


@dataclass(kw_only=True, slots=True)
class StepScheduleConfig(ScheduleConfig):
    """The factor is multiplied by `factor` every so many updates."""

    name: str = "step"
    every_updates: int = 100
    """Updates between two steps of the schedule."""
    factor: float = 0.1
    """What each step multiplies by."""

    def __post_init__(self) -> None:
        ScheduleConfig.__post_init__(self)
        require_at_least(1, schedule__every_updates=self.every_updates)
        require_positive(schedule__factor=self.factor)

    @property
    def _own_names(self) -> tuple[str, ...]:
        return ("step",)


@dataclass(kw_only=True, slots=True)
class EarlyStoppingConfig:
    """Stop when an evaluation metric has not improved for a while."""

    metric: str | None = None
    """Which metric of the evaluation to watch (`loss`, `accuracy`, …). `null`: no early stopping."""
    patience: int = 5
    """Evaluations without an improvement after which the run stops."""
    goal: Goal | None = None
    """`min` or `max`. `null`: `min` for the loss, `max` for everything else."""

    def __post_init__(self) -> None:
        require_at_least(1, train__early_stopping__patience=self.patience)


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """How long to train, when to evaluate, what to do when numbers go wrong. Everything counts updates."""

    epochs: int | None = 30
    """Passes over the training data; with `max_updates`, whichever comes first. `null`: until `max_updates`."""
    max_updates: int | None = None
    """Updates after which the run ends, wherever it is in an epoch; with `epochs`, whichever comes first. `null`: only
    `epochs` counts."""
    clip_norm: float | None = 1.0
    """Largest norm of the window's mean gradient, over all parameters together. `null`: no clipping."""
    eval_every: int | None = None
    """Updates between two evaluations. `null`: at the end of each epoch. The end of the run has one in any case."""
    eval_batch_size: int = 256
    """Samples per forward in an evaluation."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """A window whose loss or gradient is NaN or infinite: `stop` the run with a message, or `skip` the update on all
    ranks alike and count it."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)

    def __post_init__(self) -> None:
        require(
            self.epochs is not None or self.max_updates is not None,
            "train.epochs and train.max_updates are both null, so the run would never end: set one of them.",
        )
        require_at_least(1, train__epochs=self.epochs, train__max_updates=self.max_updates)
        require_at_least(1, train__eval_every=self.eval_every, train__eval_batch_size=self.eval_batch_size)
        require_positive(train__clip_norm=self.clip_norm)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept so that a run that dies goes on as if it never had."""

    enabled: bool = True
    """Save checkpoints, and at the end `model.safetensors`. `false`: neither."""
    every_updates: int | None = None
    """Updates between two checkpoints. `null`: only time counts."""
    every_minutes: float | None = 10.0
    """Minutes between two checkpoints; with `every_updates`, whichever comes first. `null`: only updates count. The end
    of a run, and a signal to stop, save one in any case."""
    keep_last: int = 2
    """The newest checkpoints that are kept."""
    keep_best: int = 0
    """Checkpoints of the best evaluations that are kept besides; an evaluation among them is saved at once."""
    best_metric: str = "loss"
    """Which metric of the evaluation decides what is best."""
    best_goal: Goal | None = None
    """`min` or `max`. `null`: `min` for the loss, `max` for everything else."""
    async_save: bool = True
    """Write beside the training, which waits only while its state is copied in memory. `false`: wait for the disk."""
    grace_seconds: float = 25.0
    """Seconds that a signal to stop leaves until the process is killed (torchrun's and SLURM's own are 30). A window
    that can't be finished in time is dropped, and the state before it saved."""

    def __post_init__(self) -> None:
        require_at_least(1, checkpoint__every_updates=self.every_updates, checkpoint__keep_last=self.keep_last)
        require_at_least(0, checkpoint__keep_best=self.keep_best, checkpoint__grace_seconds=self.grace_seconds)
        require_positive(checkpoint__every_minutes=self.every_minutes)


@dataclass(kw_only=True, slots=True)
class DistributedConfig:
    """What ranks expect of each other."""

    timeout_seconds: float = 600.0
    """How long ranks wait for one that does not come, before they stop and say which it was and what it was doing."""

    def __post_init__(self) -> None:
        require_positive(distributed__timeout_seconds=self.timeout_seconds)


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases. Imported only when used."""

    mode: WandbMode = WandbMode.offline
    """`disabled`; `offline`: into the run folder, to be uploaded with `wandb sync`; `online`."""
    project: str = "distaccum"
    """Project to log to."""
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
    """Folder for all that the run writes. `null`: `runs/` and the time of the start."""
    resume: str = "auto"
    """`auto`: go on from the newest valid checkpoint in `run_dir`, if there is one; `none`: begin anew, in a folder
    without results; or the path of a checkpoint, or of the run folder that it is in, to go on from."""
    resume_override: bool = False
    """Go on although the global batch, the seed or the training data are no longer those of the checkpoint."""
    device: DeviceChoice = DeviceChoice.auto
    """`cpu` or `cuda`; `auto`: CUDA where there is one."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = MISSING
    model: Any = MISSING
    task: Any = MISSING
    optim: Any = MISSING
    schedule: ScheduleConfig = MISSING
    strategy: StrategyConfig = MISSING
    precision: PrecisionConfig = MISSING
    train: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    observers: dict[str, Any] = field(default_factory=dict)
    """Components by name: more observers of the run, besides progress, `metrics.jsonl` and wandb."""

    def __post_init__(self) -> None:
        require_at_least(0, seed=self.seed)


def conf_dir() -> Path:
    """The folder of the Hydra groups: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
