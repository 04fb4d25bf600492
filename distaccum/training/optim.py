"""Builds optimizers, and sets their learning rates."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distaccum.accumulation.gradient_norms import by_group
from distaccum.config import OptimConfig
from distaccum.config import instantiate as targets
from distaccum.config.enums import Implementation, LrRule
from distaccum.config.optimizers import AdamW8bitConfig, MuonConfig, ScheduleFreeConfig, ScheduleFreeSGDConfig
from distaccum.errors import UserError
from distaccum.strategies.optimizers import has_two_modes, own_optimizer
from distaccum.training.buckets import fit_in_a_bucket, step_in_buckets
from distaccum.training.muon import in_parts
from distaccum.training.parameter_groups import described, split

logger = logging.getLogger(__name__)

RULE_POWERS = {LrRule.linear: 1.0, LrRule.sqrt: 0.5, LrRule.none: 0.0}
"""The power of the batch size that a rule follows."""

# Where torch has fused kernels: on the devices named, for parameters in float32 and float64.
_FUSED_DEVICES: dict[str, tuple[str, ...]] = {
    "torch.optim.SGD": ("cpu", "cuda"),
    "torch.optim.Adam": ("cpu", "cuda"),
    "torch.optim.AdamW": ("cpu", "cuda"),
    "torch.optim.Adagrad": ("cpu",),
}
_FUSED_SHARDED = ("torch.optim.Adam", "torch.optim.AdamW")


def build_optimizer(
    config: Any, model: nn.Module | Iterable[nn.Parameter], device: torch.device, *, shard: bool = False
) -> torch.optim.Optimizer:
    """Builds the optimizer of a section `optim`: one of torch's, or anybody's own by `_target_`.

    Args:
        model: whose parameters are optimized; or parameters alone, which have no names for `optim.groups` to match.
        shard: keep the state for a part of the parameters only, and send that part of each update to the other ranks
            of the process group (ZeRO stage 1; Rajbhandari et al. 2020).

    Raises:
        UserError: the section doesn't fit the optimizer or the model, or there is nothing to optimize.
    """
    module = model if isinstance(model, nn.Module) else None
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise UserError("the model has no parameter that requires a gradient, so there is nothing to train.")
    arguments, grouping = split(config)
    is_own = not isinstance(config, OptimConfig)
    if not is_own:
        arguments.pop("implementation", None)
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    groups: list[Any] = trainable
    if grouping:
        if module is None:
            raise UserError(
                "optim.groups, no_weight_decay and layer_decay need the model, whose parameters have names."
            )
        groups = grouping.groups_of(module, arguments.get("lr"))
    if isinstance(config, MuonConfig):
        if module is None:
            raise UserError("optim=muon needs the model, whose layers say which parameters are hidden matrices.")
        match, ratio = arguments.pop("adamw_match"), arguments.pop("adamw_lr_ratio")
        named = groups if grouping else [{"params": trainable}]
        groups = in_parts([{"lr": config.lr, **group} for group in named], module, match, ratio)
    names = {id(parameter): name for name, parameter in module.named_parameters()} if module is not None else {}

    def build(parameters: list[Any]) -> torch.optim.Optimizer:
        return _build_own(arguments, parameters, names) if is_own else _build(config, arguments, parameters, device)

    optimizer = _sharded(build, groups, arguments, is_own=is_own) if shard else build(groups)
    if grouping:
        grouping.check_options(own_optimizer(optimizer), None if is_own else arguments)
    if grouping or isinstance(config, MuonConfig):
        logger.info("optim: %s", described(optimizer))
    if has_two_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _build(
    config: Any, arguments: dict[str, Any], parameters: list[Any], device: torch.device
) -> torch.optim.Optimizer:
    trainable, target = _tensors(parameters), arguments[targets.TARGET]
    if isinstance(config, AdamW8bitConfig):
        _check_8bit(trainable, device)
    elif isinstance(config, ScheduleFreeConfig | ScheduleFreeSGDConfig):
        if importlib.util.find_spec("schedulefree") is None:
            raise UserError(
                "optim=schedule_free needs the package schedulefree, which is not installed: pip install "
                '"distaccum[schedulefree]".'
            )
        if arguments["foreach"] is None:  # its groups hold state, so they can't be stepped in buckets
            arguments["foreach"] = fit_in_a_bucket(trainable)
    elif isinstance(config, MuonConfig):
        if any(isinstance(parameter, DTensor) for parameter in trainable):
            raise UserError(
                "strategy=fsdp does not support optim=muon, which needs whole matrices. Set strategy=ddp "
                "strategy.shard_optimizer=true, which shards its state over the ranks by whole parameters, or "
                "optim=adamw."
            )
        kernel = _implementation_arguments("torch.optim.AdamW", config.implementation, device, trainable)
        arguments = arguments | {"kernel": kernel}
    elif (implementation := getattr(config, "implementation", None)) is not None:
        arguments = arguments | _implementation_arguments(target, implementation, device, trainable)
    try:
        optimizer = targets.build(arguments, "optim", parameters)
    except (ValueError, RuntimeError) as error:  # they check the ranges of their own arguments
        raise UserError(f"optim: {target} refuses its arguments: {error}.") from error
    assert isinstance(optimizer, torch.optim.Optimizer)
    if arguments.get("foreach") and getattr(config, "implementation", None) is Implementation.auto:
        step_in_buckets(optimizer)
    return optimizer


def _tensors(parameters: list[Any]) -> list[Tensor]:
    """Returns the parameters themselves, of groups too."""
    return [tensor for entry in parameters for tensor in (entry["params"] if isinstance(entry, dict) else (entry,))]


def _build_own(arguments: dict[str, Any], parameters: list[Any], names: Mapping[int, str]) -> torch.optim.Optimizer:
    """Builds anybody's own optimizer; if its first argument is called `named_parameters`, with names."""
    is_grouped = isinstance(parameters[0], dict)
    signature = targets.signature_of(targets.locate(arguments[targets.TARGET], "optim"))
    if not is_grouped and signature is not None and next(iter(signature.parameters), "") == "named_parameters":
        parameters = [(names.get(id(parameter), ""), parameter) for parameter in parameters]
    try:
        optimizer = targets.build(arguments, "optim", parameters)
    except (AttributeError, TypeError, ValueError) as error:
        if not is_grouped:
            raise
        raise UserError(
            f"optim.groups: {arguments[targets.TARGET]} does not take groups, dictionaries with params and options "
            f"({type(error).__name__}: {error}). Let it take them, as torch's optimizers do, or make them itself of "
            "named_parameters, if its first argument has that name."
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optim built a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    return optimizer


def _sharded(
    build: Callable[[list[Any]], torch.optim.Optimizer], groups: list[Any], arguments: dict[str, Any], *, is_own: bool
) -> torch.optim.Optimizer:
    """Builds a `ZeroRedundancyOptimizer`, in which each rank has its part of each group."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    whole = None
    if is_own and not isinstance(groups[0], dict):  # it may make groups itself, of which a part would show only some
        whole = build(groups)
        if len(whole.param_groups) > 1:
            groups = [{k: v for k, v in group.items() if k != "param_names"} for group in whole.param_groups]
    is_grouped = isinstance(groups[0], dict)
    some = _tensors(groups)[0]

    def of_a_shard(own: list[dict[str, Any]], **_: Any) -> torch.optim.Optimizer:
        # A rank may be left without a parameter, and optimizers want one to look at.
        own = [g | {"params": g["params"] or [nn.Parameter(some.detach().new_empty((0,) * some.ndim))]} for g in own]
        own = own if is_grouped else own[0]["params"]
        optimizer = build(own) if whole is None or not is_grouped else _another(whole, own)
        if has_two_modes(optimizer):
            raise UserError(
                f"strategy.shard_optimizer=true does not support {type(optimizer).__name__}: a rank could compute the "
                "weights to evaluate for its own part alone. Leave it out, or set strategy=fsdp."
            )
        return optimizer

    # The learning rate is named so that it stands in the parameter groups, where the schedule sets it.
    rate = {"lr": float(arguments["lr"])} if "lr" in arguments else {}
    return ZeroRedundancyOptimizer(groups, optimizer_class=of_a_shard, **rate)  # type: ignore[arg-type]


def _another(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns an optimizer of the same class with other groups.

    Raises:
        UserError: the class does not take groups.
    """
    kind = type(optimizer)
    known = inspect.signature(kind).parameters
    try:
        return kind(groups, **{key: value for key, value in optimizer.defaults.items() if key in known})
    except Exception as error:
        raise UserError(
            f"optim makes {len(groups)} parameter groups, and strategy.shard_optimizer=true can have one if "
            f"{kind.__name__} does not take groups itself ({type(error).__name__}: {error}). Leave that out, or set "
            "strategy=fsdp."
        ) from error


def _check_8bit(trainable: Sequence[Tensor], device: torch.device) -> None:
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


class Schedule:
    """Sets the learning rates of an optimizer for each update. The trainer applies it in `Updater.update`.

    A function of the update's number and the window's size alone, so there is no state to save, nothing that steps too
    often when there are micro-steps or ranks, and nothing to restore on resume.

    Args:
        optimizer: whose present learning rates are the peaks.
        factor: the factor of the learning rates for update 1, 2, …
        lr_rule, weight_decay_rule: how learning rates and weight decays follow the size of windows.

    Raises:
        UserError: there is no weight decay for the rule.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[int], float],
        lr_rule: LrRule = LrRule.none,
        weight_decay_rule: LrRule = LrRule.none,
    ) -> None:
        self._optimizer = optimizer
        self._factor = factor
        self._power = RULE_POWERS[lr_rule]
        self._decay_power = RULE_POWERS[weight_decay_rule]
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._decays = [group.get("weight_decay") for group in optimizer.param_groups]
        if self._decay_power and not any(self._decays):
            raise UserError(
                f"batch.weight_decay_rule={weight_decay_rule.name}: no parameter has weight decay. Set "
                "optim.weight_decay, or leave the rule out."
            )

    def apply(self, update: int, size_ratio: float = 1.0) -> float:
        """Sets the learning rates for an update (from 1), and its weight decays; returns the first group's rate.

        Args:
            size_ratio: the window's planned size over the one that the learning rate is configured for.
        """
        factor = self._factor(update)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor * size_ratio**self._power
        self._set_decays(size_ratio**self._decay_power)
        return float(self._optimizer.param_groups[0]["lr"])

    def after_update(self) -> None:
        """Sets weight decays as they are configured: so checkpoints have them, and may go on with another rule."""
        self._set_decays(1.0)

    def rates(self) -> dict[str, float]:
        """Returns the present learning rate of each group by its name; empty if there is one group."""
        return by_group(self._optimizer, (float(group["lr"]) for group in self._optimizer.param_groups))

    def _set_decays(self, factor: float) -> None:
        if not self._decay_power:
            return
        # ZeRO-1 has settings of its own, and those of the optimizer inside it.
        for groups in (self._optimizer.param_groups, own_optimizer(self._optimizer).param_groups):
            for group, decay in zip(groups, self._decays, strict=True):
                if decay is not None:
                    group["weight_decay"] = decay * factor
