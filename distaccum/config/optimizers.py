"""Typed sections of the built-in optimizers, for `optim`."""

from __future__ import annotations

from dataclasses import dataclass, field

from distaccum.config.enums import Implementation
from distaccum.config.loop import OptimConfig
from distaccum.errors import UserError, require, require_at_least


@dataclass(kw_only=True, slots=True)
class TorchOptimConfig(OptimConfig):
    """Keys that torch's optimizers share."""

    weight_decay: float = 0.0
    """Weight decay: decoupled in `adamw`, added to the gradient in all others."""
    implementation: Implementation = Implementation.auto
    """`fused`, `foreach` or `forloop`; `auto`: fused where torch supports it for the device and the parameters (under
    FSDP, for Adam alone), else foreach."""


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
        _require_two_betas(self.betas)


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
        _require_two_betas(self.betas)
        require_at_least(0, optim__min_8bit_size=self.min_8bit_size)


def _require_two_betas(betas: list[float]) -> None:
    if len(betas) != 2:
        raise UserError(f"optim.betas={betas} is impossible: it must be two numbers, as in [0.9,0.999].")
