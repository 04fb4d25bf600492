"""Optimizer, schedule, the loop itself, what is kept of it, and what is measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from distaccum.config.basics import MISSING, require_name
from distaccum.config.enums import Goal, OnNonfinite
from distaccum.errors import require, require_at_least, require_positive


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
    """Which metric of the evaluation to watch (`loss`, `accuracy`, `ema/loss`, …). `null`: no early stopping."""
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
    """What the average is multiplied by at each step of it; its memory is about 1 / (1 - decay) steps long. `null`: no
    such average."""
    first_update: int = 1
    """The first update whose weights count; the average begins as those."""
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

    The learning rate stays that of `schedule`: a constant or slowly falling one towards the end suits it best.
    """

    first_update: int | None = None
    """The first update whose weights count. `null`: no such average."""
    every_updates: int = 1
    """Updates from one that counts to the next."""

    def __post_init__(self) -> None:
        require_at_least(1, train__swa__first_update=self.first_update, train__swa__every_updates=self.every_updates)


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
    eval_batch_size: int | None = None
    """Samples per forward in an evaluation. `null`: as many as in the largest micro-batch. Halved when memory runs
    out."""
    keep_modes: bool = False
    """Leave each part of the model in the mode in which it was built. `false`: training mode for all of it, but for
    parts whose own `train()` does otherwise; `from_pretrained` of Hugging Face builds models in evaluation mode."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """A window whose loss or gradient is NaN or infinite: `stop` the run with a message, or `skip` the update on all
    ranks alike and count it."""
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
        require_positive(train__clip_norm=self.clip_norm)

    @property
    def averages(self) -> list[EmaConfig | SwaConfig]:
        """The averages of the weights that are wanted."""
        wanted: list[EmaConfig | SwaConfig] = []
        if self.ema.decay is not None:
            wanted.append(self.ema)
        if self.swa.first_update is not None:
            wanted.append(self.swa)
        return wanted


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
    """Which metric of the evaluation decides what is best: `accuracy`, `ema/loss`, …"""
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
class InsightConfig:
    """What a run tells of its gradients, besides training: no bit of the training changes, unless said."""

    noise_scale: bool = False
    """Measure the gradient noise scale (McCandlish et al. 2018), with its error, and the coherence of the
    micro-gradients. Where a window is one micro-batch on one rank, those that are measured are cut in two, which
    changes rounding."""
    every_updates: int = 64
    """Measure in each so-many-th update. What it costs is in those updates alone."""
    smoothing: float = 0.9
    """What the weight of a measurement is multiplied by at each later one: the noise scale is a mean over about
    1 / (1 - smoothing) measurements."""

    def __post_init__(self) -> None:
        require_at_least(1, insight__every_updates=self.every_updates)
        require(
            0 <= self.smoothing < 1,
            f"insight.smoothing={self.smoothing} is impossible: it must be at least 0 and below 1.",
        )
