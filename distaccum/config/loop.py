"""Configuration of the optimizer, its schedule, the loop, checkpoints and measurements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from distaccum.config.basics import MISSING, require_name
from distaccum.config.enums import DecayShape, Goal, OnNonfinite
from distaccum.errors import require, require_at_least, require_one_clipping, require_positive


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimizer: a component that is called with the parameters and the keys of this section."""

    _target_: str = MISSING
    """Import path of the optimizer."""
    lr: float = MISSING
    """Peak learning rate; `schedule` multiplies it by a factor for each update."""
    groups: list[Any] = field(default_factory=list)
    """Parameters with options of their own: `[{match: [head.*], lr: 0.01}, …]`, with patterns of their names, any
    option of the optimizer, and a `name` for the log. The first match wins."""
    no_weight_decay: list[str] = field(default_factory=list)
    """Kinds of parameters without weight decay: `bias`, `norm` (all of normalization layers), `embedding`."""
    layer_decay: float | None = None
    """Multiplies the learning rate once for each layer above a parameter: lowest for embeddings, 1 for the head."""


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """The factor of `optim.lr`, a function of the update's number alone.

    With `schedule=custom` it is your own: `schedule._target_` is called with the number of the run's last update and
    the section's other keys, and returns a function of the update's number, from 1.
    """

    _own_names: ClassVar[tuple[str, ...]] = ("constant",)

    name: str = "constant"
    """`constant`, `linear`, `cosine`, `polynomial`, `wsd` or `step`."""
    warmup_updates: int = 0
    """Updates over which the factor rises linearly to 1 at the start."""
    warmup_ratio: float | None = None
    """The warm-up as a fraction of all updates of the run, rounded to whole updates, in place of `warmup_updates`."""

    def __post_init__(self) -> None:
        require_name("schedule", self.name, *self._own_names)
        require_at_least(0, schedule__warmup_updates=self.warmup_updates)
        require(
            self.warmup_ratio is None or 0 <= self.warmup_ratio <= 1,
            f"schedule.warmup_ratio={self.warmup_ratio} is impossible: it must be at least 0 and at most 1, 0.05 for "
            "instance.",
        )
        require(
            self.warmup_ratio is None or not self.warmup_updates,
            f"schedule.warmup_updates={self.warmup_updates} and schedule.warmup_ratio={self.warmup_ratio} both say how "
            "long the warm-up is. Set schedule.warmup_updates=0 or schedule.warmup_ratio=null.",
        )


@dataclass(kw_only=True, slots=True)
class DecayScheduleConfig(ScheduleConfig):
    """`linear` or `cosine` decay from the end of the warm-up to the end of the run."""

    _own_names: ClassVar[tuple[str, ...]] = ("linear", "cosine")

    final_factor: float = 0.0
    """The factor at the last update. 0 would come at the update after it, as an update with it would do nothing."""

    def __post_init__(self) -> None:
        ScheduleConfig.__post_init__(self)
        require_at_least(0, schedule__final_factor=self.final_factor)


@dataclass(kw_only=True, slots=True)
class PolynomialScheduleConfig(DecayScheduleConfig):
    """Decay by a power of what is left of the run, as in DeepLab (Chen et al. 2017); `final_factor` as for `linear`."""

    _own_names: ClassVar[tuple[str, ...]] = ("polynomial",)

    name: str = "polynomial"
    power: float = 0.9
    """The power; 1 is `linear`."""

    def __post_init__(self) -> None:
        DecayScheduleConfig.__post_init__(self)
        require_positive(schedule__power=self.power)


@dataclass(kw_only=True, slots=True)
class WSDScheduleConfig(DecayScheduleConfig):
    """Warm-up, stable, decay (Hu et al. 2024): a decay in the last updates alone; `final_factor` as for `linear`."""

    _own_names: ClassVar[tuple[str, ...]] = ("wsd",)

    name: str = "wsd"
    decay_ratio: float = 0.1
    """The decay as a fraction of all updates of the run, rounded to whole updates, at least one."""
    shape: DecayShape = DecayShape.linear
    """Of the decay: `linear`, `cosine`, or `one_minus_sqrt`, which falls fast and then slowly (Hägele et al. 2024)."""

    def __post_init__(self) -> None:
        DecayScheduleConfig.__post_init__(self)
        require(
            0 < self.decay_ratio <= 1,
            f"schedule.decay_ratio={self.decay_ratio} is impossible: it must be above 0 and at most 1, 0.1 for "
            "instance.",
        )


@dataclass(kw_only=True, slots=True)
class StepScheduleConfig(ScheduleConfig):
    """The learning rate is multiplied by `factor` every `every_updates` updates."""

    _own_names: ClassVar[tuple[str, ...]] = ("step",)

    name: str = "step"
    every_updates: int = 100
    """Updates from one step of the schedule to the next."""
    factor: float = 0.1
    """Multiplies the learning rate at each step."""

    def __post_init__(self) -> None:
        ScheduleConfig.__post_init__(self)
        require_at_least(1, schedule__every_updates=self.every_updates)
        require_positive(schedule__factor=self.factor)


@dataclass(kw_only=True, slots=True)
class EarlyStoppingConfig:
    """Ends the run when a metric of the evaluations has not improved for a while."""

    metric: str | None = None
    """Metric of the evaluations to watch (`loss`, `accuracy`, `ema/loss`, …). `null`: no early stopping."""
    patience: int = 5
    """Evaluations without an improvement after which the run stops."""
    goal: Goal | None = None
    """`min` or `max`. `null`: `min` for the loss, `max` for everything else."""

    def __post_init__(self) -> None:
        require_at_least(1, train__early_stopping__patience=self.patience)


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """An exponential moving average of the weights, evaluated and exported beside the weights themselves."""

    decay: float | None = None
    """Multiplies the average at each of its steps; the average spans about 1 / (1 - decay) steps. `null`: no such
    average."""
    first_update: int = 1
    """The first update whose weights count; the average begins with them."""
    every_updates: int = 1
    """Updates from one step of the average to the next."""

    def __post_init__(self) -> None:
        require(
            self.decay is None or 0 < self.decay < 1,
            f"train.ema.decay={self.decay} is impossible: it must be above 0 and below 1, 0.999 for instance.",
        )
        require_at_least(1, train__ema__first_update=self.first_update, train__ema__every_updates=self.every_updates)


@dataclass(kw_only=True, slots=True)
class SwaConfig:
    """Stochastic weight averaging: the plain mean of the weights from some update on (Izmailov et al. 2018).

    The learning rate stays that of `schedule`; a constant or slowly falling one at the end suits the average best.
    """

    first_update: int | None = None
    """The first update whose weights count. `null`: no such average."""
    every_updates: int = 1
    """Updates from one whose weights count to the next."""

    def __post_init__(self) -> None:
        require_at_least(1, train__swa__first_update=self.first_update, train__swa__every_updates=self.every_updates)


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """The length of the training, its evaluations, and what happens when numbers are not finite."""

    epochs: int | None = 30
    """Passes over the training data; with `max_updates`, whichever ends first. `null`: only `max_updates` counts."""
    max_updates: int | None = None
    """Updates after which the run ends, in the middle of an epoch too; with `epochs`, whichever ends first. `null`:
    only `epochs` counts."""
    clip_norm: float | None = 1.0
    """Largest norm of the window's mean gradient, over all parameters together; a longer one is scaled down to it.
    `null`: no clipping."""
    clip_value: float | None = None
    """Largest absolute value of each number of the window's mean gradient; needs `clip_norm=null`. `null`: no such
    limit."""
    eval_every: int | None = None
    """Updates from one evaluation to the next. `null`: one at the end of each epoch. The run ends with one in any
    case."""
    eval_batch_size: int | None = None
    """Samples per forward in an evaluation. `null`: as many as in the largest micro-batch. Halved when memory runs
    out."""
    keep_modes: bool = False
    """Leave each module in the mode in which it was built. `false`: call the model's `train()`, which puts all modules
    into training mode that don't override it; `from_pretrained` of Hugging Face builds models in evaluation mode."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """What happens when a window's loss or gradient is NaN or infinite. `stop`: the run ends with a message; `skip`:
    all ranks skip the update and count it."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    swa: SwaConfig = field(default_factory=SwaConfig)

    def __post_init__(self) -> None:
        require(
            self.epochs is not None or self.max_updates is not None,
            "train.epochs and train.max_updates are both null, so the run would never end: set one of them.",
        )
        require_at_least(1, train__epochs=self.epochs, train__max_updates=self.max_updates)
        require_at_least(1, train__eval_every=self.eval_every, train__eval_batch_size=self.eval_batch_size)
        require_one_clipping(train__clip_norm=self.clip_norm, train__clip_value=self.clip_value)

    @property
    def averages(self) -> list[EmaConfig | SwaConfig]:
        """The configured averages of the weights."""
        wanted: list[EmaConfig | SwaConfig] = []
        if self.ema.decay is not None:
            wanted.append(self.ema)
        if self.swa.first_update is not None:
            wanted.append(self.swa)
        return wanted


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints, from which an interrupted run goes on as if it had never stopped."""

    enabled: bool = True
    """Save checkpoints, and at the end `model.safetensors`. `false`: neither."""
    every_updates: int | None = None
    """Updates from one checkpoint to the next. `null`: only time counts."""
    every_minutes: float | None = 10.0
    """Minutes from one checkpoint to the next; with `every_updates`, whichever comes first. `null`: only updates count.
    At the end of the run, and on a signal to stop, one is saved in any case."""
    memory_every_updates: int | None = None
    """Updates from one state to the next that is kept in the memory of the nodes (tmpfs), where it outlives the run's
    processes: a crash costs no more updates than that. `null`: none are kept there."""
    keep_last: int = 2
    """Number of the newest checkpoints to keep."""
    keep_best: int = 0
    """Number of checkpoints of the best evaluations to keep as well; each is saved right after its evaluation."""
    best_metric: str = "loss"
    """Metric of the evaluations by which `keep_best` chooses, and whose best value a sweep (`-m`) notes and its sweeper
    optimises: `loss`, `accuracy`, `ema/loss`, `loss/NAME` of one of several losses, …"""
    best_goal: Goal | None = None
    """`min` or `max`. `null`: `min` for the loss, `max` for everything else."""
    trainable_only: bool | None = None
    """Leave out frozen weights, which are then those that the model is built with at a restart; a fingerprint in the
    checkpoint shows whether they are the same. `null`: `true` for language models of transformers whose weights come
    from files."""
    async_save: bool = True
    """Write while the training goes on, which waits only until its state is copied in memory. `false`: the training
    waits until the checkpoint is on the disk."""
    grace_seconds: float = 25.0
    """Seconds from a signal to stop until the process is killed (30 with torchrun and SLURM). A window that can't be
    finished in time is left in the middle and saved as far as it is."""

    def __post_init__(self) -> None:
        require_at_least(1, checkpoint__every_updates=self.every_updates, checkpoint__keep_last=self.keep_last)
        require_at_least(1, checkpoint__memory_every_updates=self.memory_every_updates)
        require_at_least(0, checkpoint__keep_best=self.keep_best, checkpoint__grace_seconds=self.grace_seconds)
        require_positive(checkpoint__every_minutes=self.every_minutes)


@dataclass(kw_only=True, slots=True)
class InsightConfig:
    """Measurements of the gradients during a run; the training stays the same bit for bit, unless stated."""

    layers: bool = False
    """Measure the norm of the gradient, before clipping, and of the update relative to the weights, of each block of
    the model (of those that FSDP shards). A measured update scales its gradient before it is clipped, which changes
    rounding, and holds a copy of the weights."""
    noise_scale: bool = False
    """Measure the gradient noise scale (McCandlish et al. 2018), with its error, and the coherence of the
    micro-gradients. Where a window is one micro-batch on one rank, measured windows are cut in two, which changes
    rounding."""
    every_updates: int = 64
    """Updates from one measurement to the next. All other updates cost nothing more."""
    smoothing: float = 0.9
    """Multiplies the weight of a measurement at each later one: the noise scale is a mean over about
    1 / (1 - smoothing) measurements."""

    def __post_init__(self) -> None:
        require_at_least(1, insight__every_updates=self.every_updates)
        require(
            0 <= self.smoothing < 1,
            f"insight.smoothing={self.smoothing} is impossible: it must be at least 0 and below 1.",
        )
