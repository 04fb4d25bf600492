"""Typed sections of the built-in optimizers, for `optim`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distaccum.config.enums import Implementation
from distaccum.config.loop import OptimConfig
from distaccum.errors import UserError, require, require_at_least, require_positive


@dataclass(kw_only=True, slots=True)
class TorchOptimConfig(OptimConfig):
    """Keys that torch's optimizers share."""

    weight_decay: float = 0.0
    """Weight decay: decoupled in `adamw` and `adafactor`, and where an option says so; else added to the gradient."""
    implementation: Implementation = Implementation.auto
    """`fused`, `foreach` or `forloop`; `auto`: fused where torch supports it for the device and the parameters (under
    FSDP, for Adam alone), else foreach for a part of the parameters at a time, so that a step's temporaries are at most
    25 MiB, or those of the largest parameter. With `foreach` they are once or twice as large as all parameters."""


@dataclass(kw_only=True, slots=True)
class SGDConfig(TorchOptimConfig):
    """Stochastic gradient descent (`sgd`, `momentum`, `nesterov`)."""

    _target_: str = "torch.optim.SGD"
    lr: float = 0.1
    momentum: float = 0.0
    """Multiplies the velocity at each update."""
    nesterov: bool = False
    """Nesterov's look-ahead; needs momentum."""


@dataclass(kw_only=True, slots=True)
class RMSpropConfig(TorchOptimConfig):
    """RMSprop."""

    _target_: str = "torch.optim.RMSprop"
    lr: float = 1e-3
    alpha: float = 0.99
    """Decay of the mean square."""
    eps: float = 1e-8
    """Added to the denominator."""
    momentum: float = 0.0
    """Multiplies the velocity at each update."""


@dataclass(kw_only=True, slots=True)
class AdagradConfig(TorchOptimConfig):
    """Adagrad."""

    _target_: str = "torch.optim.Adagrad"
    lr: float = 1e-2
    eps: float = 1e-10
    """Added to the denominator."""


@dataclass(kw_only=True, slots=True)
class AdadeltaConfig(TorchOptimConfig):
    """Adadelta."""

    _target_: str = "torch.optim.Adadelta"
    lr: float = 1.0
    rho: float = 0.9
    """Decay of the mean squares."""
    eps: float = 1e-6
    """Added to the denominator."""


@dataclass(kw_only=True, slots=True)
class LBFGSConfig(OptimConfig):
    """L-BFGS (Nocedal 1980). It evaluates each window several times, so windows should be the whole data set. Needs
    `train.clip_norm=null`. Not supported with `fsdp`, `strategy.shard_optimizer`, `precision=fp16` or `bf16_params`,
    `batch.micro_batch_size=auto`, `train.on_nonfinite=skip` or `insight.noise_scale`."""

    _target_: str = "torch.optim.LBFGS"
    lr: float = 1.0
    max_iter: int = 20
    """Most iterations in an update."""
    max_eval: int | None = None
    """Most evaluations of the window in an update, the line search's included. `null`: 1.25 × `max_iter`."""
    history_size: int = 10
    """Differences of gradients, and of parameters, to remember; each takes the memory of the parameters."""
    tolerance_grad: float = 1e-7
    """An update ends when no number of the gradient is larger."""
    tolerance_change: float = 1e-9
    """An update ends when neither the loss nor any parameter changes by more."""
    line_search_fn: str | None = "strong_wolfe"
    """`strong_wolfe`: search for each step's length, with more evaluations. `null`: take `lr`."""

    def __post_init__(self) -> None:
        require_at_least(1, optim__max_iter=self.max_iter, optim__max_eval=self.max_eval)
        require_at_least(1, optim__history_size=self.history_size)
        require(
            self.line_search_fn in (None, "strong_wolfe"),
            f"optim.line_search_fn={self.line_search_fn} is impossible: it must be strong_wolfe or null.",
        )


@dataclass(kw_only=True, slots=True)
class AdamConfig(TorchOptimConfig):
    """Adam (`adam`, `amsgrad`) and AdamW (`adamw`)."""

    _target_: str = "torch.optim.Adam"
    lr: float = 2e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    amsgrad: bool = False
    """Divide by the largest second moment so far."""

    def __post_init__(self) -> None:
        _require_two("betas", self.betas)


@dataclass(kw_only=True, slots=True)
class RAdamConfig(TorchOptimConfig):
    """RAdam (Liu et al. 2020): Adam whose step is corrected for the variance of its first second moments."""

    _target_: str = "torch.optim.RAdam"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    decoupled_weight_decay: bool = False
    """Decoupled weight decay, as in AdamW."""

    def __post_init__(self) -> None:
        _require_two("betas", self.betas)


@dataclass(kw_only=True, slots=True)
class NAdamConfig(TorchOptimConfig):
    """NAdam (Dozat 2016): Adam with Nesterov's momentum."""

    _target_: str = "torch.optim.NAdam"
    lr: float = 2e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    momentum_decay: float = 4e-3
    """How fast the momentum rises to the first of `betas`."""
    decoupled_weight_decay: bool = False
    """Decoupled weight decay, as in AdamW."""

    def __post_init__(self) -> None:
        _require_two("betas", self.betas)


@dataclass(kw_only=True, slots=True)
class AdamaxConfig(TorchOptimConfig):
    """Adamax (Kingma and Ba 2015): Adam with the maximum norm in place of the second moment."""

    _target_: str = "torch.optim.Adamax"
    lr: float = 2e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the first moment and of the maximum."""
    eps: float = 1e-8
    """Added to the denominator."""

    def __post_init__(self) -> None:
        _require_two("betas", self.betas)


@dataclass(kw_only=True, slots=True)
class ASGDConfig(TorchOptimConfig):
    """SGD with the step size lr / (1 + lambd · lr · t)^alpha (Polyak and Juditsky 1992). torch computes that of an
    update at the end of the one before, so a schedule takes effect an update later. The average that torch keeps is not
    evaluated or exported: `train.swa` keeps one that is."""

    _target_: str = "torch.optim.ASGD"
    lr: float = 1e-2
    lambd: float = 1e-4
    """Pulls parameters towards zero, and lowers the step size."""
    alpha: float = 0.75
    """Power of the step size's decay."""
    t0: float = 1e6
    """Steps before torch begins to average."""


@dataclass(kw_only=True, slots=True)
class AdafactorConfig(TorchOptimConfig):
    """Adafactor (Shazeer and Stern 2018): a second moment of rows and columns alone, and no first moment. Weight decay
    is decoupled. Needs whole matrices, so `strategy=fsdp` does not support it."""

    _target_: str = "torch.optim.Adafactor"
    lr: float = 1e-2
    """Largest relative step size; a step is relative to the root mean square of its parameter."""
    beta2_decay: float = -0.8
    """Power of the step's number by which the second moment's decay approaches 1."""
    eps: list[float | None] = field(default_factory=lambda: [None, 1e-3])
    """Added to the squared gradient (`null`: the format's own), and the least root mean square of a parameter."""
    d: float = 1.0
    """Largest root mean square of an update before the step size."""

    def __post_init__(self) -> None:
        _require_two("eps", self.eps)


@dataclass(kw_only=True, slots=True)
class RpropConfig(OptimConfig):
    """Resilient backpropagation (Riedmiller and Braun 1993): steps by signs of gradients, for windows that are the
    whole data. A step size for each number begins at `lr` and then follows its gradient's sign alone, so `schedule`
    must be constant. `strategy=fsdp` does not support it."""

    _target_: str = "torch.optim.Rprop"
    lr: float = 1e-2
    """Step size of the first update."""
    etas: list[float] = field(default_factory=lambda: [0.5, 1.2])
    """Multiply a step size where the gradient's sign has changed, and where it has not."""
    step_sizes: list[float] = field(default_factory=lambda: [1e-6, 50.0])
    """Least and largest step size."""
    implementation: Implementation = Implementation.auto
    """`foreach` or `forloop`; `auto`: foreach for a part of the parameters at a time."""

    def __post_init__(self) -> None:
        _require_two("etas", self.etas)
        _require_two("step_sizes", self.step_sizes)


@dataclass(kw_only=True, slots=True)
class LionConfig(OptimConfig):
    """Lion (Chen et al. 2023): steps by the sign of a mix of momentum and gradient, with one moment of state. Its
    learning rate should be 3 to 10 times lower than AdamW's, and its weight decay as much higher."""

    _target_: str = "distaccum.training.lion.Lion"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Part of the momentum in the step's direction, and the momentum's decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""

    def __post_init__(self) -> None:
        _require_two("betas", self.betas)


@dataclass(kw_only=True, slots=True)
class MuonConfig(OptimConfig):
    """Muon (Jordan et al. 2024) for hidden matrices, the weights of linear layers that are neither embedding nor head;
    AdamW for all other parameters. `strategy=fsdp` does not support it."""

    _target_: str = "distaccum.training.muon.Muon"
    lr: float = 2e-3
    weight_decay: float = 0.1
    """Decoupled weight decay, of both parts."""
    momentum: float = 0.95
    """Decay of Muon's momentum."""
    nesterov: bool = True
    """Nesterov's look-ahead in Muon."""
    ns_steps: int = 5
    """Steps of the iteration that makes a matrix nearly orthogonal."""
    adjust_lr_fn: str = "match_rms_adamw"
    """Factor of Muon's steps: `match_rms_adamw`, 0.2 √max(rows, columns), which makes them as large as AdamW's (Liu et
    al. 2025); `original`: √max(1, rows / columns), for an `lr` of about 0.02."""
    adamw_lr_ratio: float = 1.0
    """AdamW's learning rate over `lr`, the same throughout the schedule."""
    adamw_match: list[str] = field(default_factory=list)
    """Patterns of the names of matrices for AdamW that would be Muon's: `[value_head.*]`."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    implementation: Implementation = Implementation.auto
    """Of AdamW, as for `optim=adamw`."""

    def __post_init__(self) -> None:
        _require_two("betas", self.betas)
        require_positive(optim__adamw_lr_ratio=self.adamw_lr_ratio)
        require(
            self.adjust_lr_fn in ("match_rms_adamw", "original"),
            f"optim.adjust_lr_fn={self.adjust_lr_fn} is impossible: it must be match_rms_adamw or original.",
        )


@dataclass(kw_only=True, slots=True)
class ScheduleFreeConfig(OptimConfig):
    """AdamW without a schedule (`schedule_free`; Defazio et al. 2024), of the package `schedulefree` (the extra
    `schedulefree`). Evaluated, averaged and exported are its averaged weights. A warm-up (`schedule.warmup_updates`) is
    its only schedule. Not supported with `strategy.shard_optimizer=true`."""

    _target_: str = "schedulefree.AdamWScheduleFree"
    lr: float = 2.5e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Part of the average in the weights that gradients are taken at, and the second moment's decay."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Weight decay of the weights that gradients are taken at."""
    r: float = 0.0
    """Power of the update's number that weighs it in the average."""
    weight_lr_power: float = 2.0
    """Power of the largest learning rate so far that weighs an update in the average."""
    foreach: bool | None = None
    """Step all parameters together, with temporaries of their size; `null`: if these are at most 25 MiB."""

    def __post_init__(self) -> None:
        _require_two("betas", self.betas)


@dataclass(kw_only=True, slots=True)
class ScheduleFreeSGDConfig(OptimConfig):
    """SGD without a schedule (`schedule_free_sgd`), as `schedule_free`."""

    _target_: str = "schedulefree.SGDScheduleFree"
    lr: float = 1.0
    momentum: float = 0.9
    """Part of the average in the weights that gradients are taken at."""
    weight_decay: float = 0.0
    """Weight decay of the weights that gradients are taken at."""
    r: float = 0.0
    """Power of the update's number that weighs it in the average."""
    weight_lr_power: float = 2.0
    """Power of the largest learning rate so far that weighs an update in the average."""
    foreach: bool | None = None
    """Step all parameters together, with temporaries of their size; `null`: if these are at most 25 MiB."""


@dataclass(kw_only=True, slots=True)
class AdamW8bitConfig(OptimConfig):
    """AdamW of bitsandbytes (the extra `adam8bit`) with moments in 8 bits, in blocks of 256 numbers with a scale each
    (Dettmers et al. 2022). Not supported with `strategy=fsdp`."""

    _target_: str = "bitsandbytes.optim.AdamW8bit"
    lr: float = 2e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    min_8bit_size: int = 4096
    """Parameters with fewer numbers than this have moments in 32 bits."""

    def __post_init__(self) -> None:
        _require_two("betas", self.betas)
        require_at_least(0, optim__min_8bit_size=self.min_8bit_size)


NEED_WHOLE_PARAMETERS = (AdamW8bitConfig, AdafactorConfig, MuonConfig, RpropConfig)
"""Sections of optimizers that `strategy=fsdp` does not support."""
NEED_ALL_STATE = (ScheduleFreeConfig, ScheduleFreeSGDConfig)
"""Sections of optimizers that `strategy.shard_optimizer=true` does not support."""


def _require_two(key: str, value: list[Any]) -> None:
    if len(value) != 2:
        raise UserError(f"optim.{key}={value} is impossible: it must be two numbers, as in [0.9,0.999].")
