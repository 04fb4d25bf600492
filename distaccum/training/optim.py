"""Builds optimizers, and learning-rate schedules as functions of the update's number."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distaccum.config import DecayScheduleConfig, OptimConfig, ScheduleConfig, StepScheduleConfig
from distaccum.config import instantiate as targets
from distaccum.config.enums import Implementation, LrRule
from distaccum.config.optimizers import AdamW8bitConfig, ScheduleFreeConfig, ScheduleFreeSGDConfig
from distaccum.errors import UserError
from distaccum.strategies.optimizers import has_two_modes

logger = logging.getLogger(__name__)

LR_POWERS = {LrRule.linear: 1.0, LrRule.sqrt: 0.5, LrRule.none: 0.0}
"""The power of the batch size that the learning rate follows."""

# Where torch has fused kernels: on the devices named, for parameters in float32 and float64.
_FUSED_DEVICES: dict[str, tuple[str, ...]] = {
    "torch.optim.SGD": ("cpu", "cuda"),
    "torch.optim.Adam": ("cpu", "cuda"),
    "torch.optim.AdamW": ("cpu", "cuda"),
    "torch.optim.Adagrad": ("cpu",),
}
_FUSED_SHARDED = ("torch.optim.Adam", "torch.optim.AdamW")


def build_optimizer(
    config: Any, parameters: Iterable[nn.Parameter], device: torch.device, *, shard: bool = False
) -> torch.optim.Optimizer:
    """Builds the optimizer of a section `optim`: one of torch's, or anybody's own by `_target_`.

    Args:
        shard: keep the state for a part of the parameters only, and send that part of each update to the other ranks
            of the process group (ZeRO stage 1; Rajbhandari et al. 2020).

    Raises:
        UserError: the section doesn't fit the optimizer, or there is nothing to optimize.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise UserError("the model has no parameter that requires a gradient, so there is nothing to train.")
    if shard:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        def of_a_shard(groups: list[dict[str, Any]], **_: Any) -> torch.optim.Optimizer:
            # A rank may be left without a parameter, and optimizers want one to look at.
            own = groups[0]["params"] or [nn.Parameter(trainable[0].detach().new_empty((0,) * trainable[0].ndim))]
            optimizer = _build(config, own, device)
            if has_two_modes(optimizer):
                raise UserError(
                    f"strategy.shard_optimizer=true does not support {type(optimizer).__name__}: a rank could compute "
                    "the weights to evaluate for its own part alone. Leave it out, or set strategy=fsdp."
                )
            if len(optimizer.param_groups) > 1:
                raise UserError(
                    f"optim makes {len(optimizer.param_groups)} parameter groups, and strategy.shard_optimizer=true "
                    "can have one. Leave that out, or set strategy=fsdp."
                )
            return optimizer

        # The learning rate is named so that it stands in the parameter groups, where the schedule sets it.
        return ZeroRedundancyOptimizer(trainable, optimizer_class=of_a_shard, lr=_learning_rate(config))  # type: ignore[arg-type]
    optimizer = _build(config, trainable, device)
    if has_two_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _learning_rate(config: Any) -> float:
    return float(config["lr"] if isinstance(config, dict) else config.lr)


def _build(config: Any, trainable: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    if not isinstance(config, OptimConfig):
        return _build_own(config, trainable)
    arguments = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "implementation"}
    target = arguments[targets.TARGET]
    if isinstance(config, AdamW8bitConfig):
        _check_8bit(trainable, device)
    elif isinstance(config, ScheduleFreeConfig | ScheduleFreeSGDConfig):
        if importlib.util.find_spec("schedulefree") is None:
            raise UserError(
                "optim=schedule_free needs the package schedulefree, which is not installed: pip install "
                '"distaccum[schedulefree]".'
            )
    elif (implementation := getattr(config, "implementation", None)) is not None:
        arguments |= _implementation_arguments(target, implementation, device, trainable)
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        optimizer = targets.build(arguments, "optim", trainable)
    except (ValueError, RuntimeError) as error:  # they check the ranges of their own arguments
        raise UserError(f"optim: {target} refuses its arguments: {error}.") from error
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _build_own(config: Any, trainable: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = targets.build(config, "optim", trainable)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optim built a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    return optimizer


def _check_8bit(trainable: list[nn.Parameter], device: torch.device) -> None:
    if not has_8bit():
        raise UserError(
            'optim=adamw8bit needs bitsandbytes, which is not installed: pip install "distaccum[adam8bit]", or take '
            "optim=adamw."
        )
    if any(isinstance(parameter, DTensor) for parameter in trainable):
        raise UserError(
            "strategy=fsdp does not support optim=adamw8bit: bitsandbytes knows no sharded parameters. Set "
            "strategy=ddp strategy.shard_optimizer=true, which shards its state over the ranks, or optim=adamw."
        )
    if device.type == "cuda" and any(parameter.dtype is torch.float64 for parameter in trainable):
        raise UserError("optim=adamw8bit takes no float64 parameters on a GPU. Set another precision, or optim=adamw.")
    # At its import it warns of kernels for inference that are not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def has_8bit() -> bool:
    """Whether `optim=adamw8bit` is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def _implementation_arguments(
    target: str, implementation: Implementation, device: torch.device, trainable: Sequence[Tensor]
) -> dict[str, bool]:
    lacks = "" if device.type in _FUSED_DEVICES.get(target, ()) else f"on {device.type}"
    if target not in _FUSED_SHARDED and any(isinstance(parameter, DTensor) for parameter in trainable):
        lacks = "for the sharded parameters of strategy=fsdp"
    if any(parameter.is_complex() for parameter in trainable):
        lacks = "for complex parameters"
    if implementation is Implementation.fused and lacks:
        raise UserError(f"optim.implementation=fused: torch has no fused {target} {lacks}. Use auto.")
    if implementation is Implementation.fused or (implementation is Implementation.auto and not lacks):
        return {"fused": True}
    return {"foreach": implementation is not Implementation.forloop}


def schedule_factor(config: ScheduleConfig, total_updates: int) -> Callable[[int], float]:
    """Returns a function that gives the factor of the learning rate for update 1, 2, …, `total_updates`.

    During the warm-up the factor of update *t* is t / warmup_updates. After it, with x from 0 at the warm-up's end to
    1 at the last update: linear 1 − x · (1 − final), cosine final + (1 − final) · (1 + cos πx) / 2 (Loshchilov and
    Hutter 2017, without restarts), step factor^⌊updates since the peak / every_updates⌋.

    Raises:
        UserError: the warm-up is longer than the run.
    """
    warmup = config.warmup_updates
    if warmup > total_updates:
        raise UserError(
            f"schedule.warmup_updates={warmup} is longer than the run, which has {total_updates} updates. "
            "Shorten the warm-up or train longer."
        )

    def after_warmup(update: int) -> float:
        since = update - max(1, warmup)  # 0 at the peak: the last update of the warm-up, or the first of all
        done = since / max(1, total_updates - max(1, warmup))
        match config:
            case StepScheduleConfig():
                return float(config.factor ** (since // config.every_updates))
            case DecayScheduleConfig(name="linear"):
                return 1 - done * (1 - config.final_factor)
            case DecayScheduleConfig(name="cosine"):
                return config.final_factor + (1 - config.final_factor) * (1 + math.cos(math.pi * done)) / 2
        return 1.0

    return lambda update: update / warmup if update < warmup else after_warmup(update)


class Schedule:
    """Sets the learning rates of an optimizer for each update. The trainer applies it in `Updater.update`.

    A function of the update's number and the window's size alone, so there is no state to save, nothing that steps too
    often when there are micro-steps or ranks, and nothing to restore on resume.

    Args:
        optimizer: whose present learning rates are the peaks.
        factor: the factor of the learning rates for update 1, 2, …
        lr_rule: how learning rates follow the size of windows.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], lr_rule: LrRule = LrRule.none
    ) -> None:
        self._optimizer = optimizer
        self._factor = factor
        self._power = LR_POWERS[lr_rule]
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def apply(self, update: int, size_ratio: float = 1.0) -> float:
        """Sets the learning rates for an update (from 1); returns that of the first parameter group.

        Args:
            size_ratio: the window's planned size over the one that the learning rate is configured for.
        """
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * self._factor(update) * size_ratio**self._power
        return float(self._optimizer.param_groups[0]["lr"])
