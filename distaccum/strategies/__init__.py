"""Strategies: how a model is placed on devices, and how its gradients are synchronised."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distaccum.config import DDPConfig, DPConfig, FSDPConfig, StrategyConfig
from distaccum.config.enums import PrecisionName
from distaccum.errors import UserError
from distaccum.runtime.compilation import Compilation
from distaccum.strategies.base import Strategy, Traffic, local_parts
from distaccum.strategies.ddp import DDPStrategy, place_ddp
from distaccum.strategies.dp import DPStrategy, place_dp
from distaccum.strategies.single import SingleStrategy

__all__ = [
    "DDPStrategy",
    "DPStrategy",
    "SingleStrategy",
    "Strategy",
    "Traffic",
    "local_parts",
    "needs_equal_forwards",
    "needs_equal_micro_steps",
    "place",
    "shards_optimizer",
    "strategy_of",
]


def place(
    module: nn.Module,
    config: StrategyConfig,
    device: torch.device,
    precision: PrecisionName = PrecisionName.fp32,
    compilation: Compilation | None = None,
) -> Strategy:
    """Moves a module to this rank's device and wraps or shards it as the strategy's configuration says.

    A module on the meta device stays there under FSDP: whoever calls gives its shards memory and numbers.

    Args:
        precision: what the model computes in, for strategies that gather parameters in that format.
        compilation: how to compile the model; None for not at all.

    Raises:
        UserError: the strategy does not support the precision, the compilation or the number of processes.
    """
    if not isinstance(config, FSDPConfig):  # which moves one block after another
        module = module.to(device)
    if compilation is not None and isinstance(config, DPConfig):
        raise UserError(
            "strategy=dp does not support compile=true: its replicas are made anew in each forward. Set strategy=ddp "
            "or single, or compile=false."
        )
    if compilation is not None and not isinstance(config, FSDPConfig):
        # Inside DDP: torch then cuts the backward where DDP's buckets end, so that they are sent beside it.
        compilation.apply(module)
    if isinstance(config, DDPConfig):
        return place_ddp(module, config, device, precision)
    if isinstance(config, FSDPConfig):
        # Here and not above: importing FSDP takes as long as starting a small run.
        from distaccum.strategies.fsdp import place_fsdp

        return place_fsdp(module, config, device, precision, compilation)
    if precision is PrecisionName.bf16_params:
        for parameter in module.parameters():
            # Else gradients are added up in bfloat16, whose 8 bits swallow what is small beside the sum so far.
            parameter.grad_dtype = torch.float32
    if isinstance(config, DPConfig):
        return place_dp(module, config, device)
    if dist.is_initialized() and (world_size := dist.get_world_size()) > 1:
        raise UserError(
            f"strategy=single is one process, and the launcher started {world_size}: each would train a model of its "
            "own. Set strategy=ddp, or start one process."
        )
    return SingleStrategy(module)


def strategy_of(model: nn.Module, given: Strategy | None = None) -> Strategy:
    """Returns the strategy by which a model of the user's own loop is placed already.

    Args:
        given: the strategy that the user has passed.

    Raises:
        UserError: the model is bare although there are several ranks, whose gradients would never be added up; or
            `given` has another number of ranks.
    """
    own: Strategy | None = None
    if isinstance(model, DistributedDataParallel):
        own = DDPStrategy(model)
    elif any(parent.__name__ == "FSDPModule" for parent in type(model).__mro__):  # what fully_shard makes of a class
        from distaccum.strategies.fsdp import FSDPStrategy, device_of

        own = FSDPStrategy(model, device_of(model))
    if own is not None and given is not None and own.world_size != given.world_size:
        raise UserError(
            f"strategy={type(given).__name__}(…) is of {given.world_size} rank(s), and the model is a "
            f"{type(model).__name__} of {own.world_size}, which adds up their gradients. Leave strategy= out; or pass "
            "the module inside as the model, if each rank is meant to train its own."
        )
    if found := given or own:
        return found
    if dist.is_initialized() and (world_size := dist.get_world_size()) > 1:
        raise UserError(
            f"the model is a bare {type(model).__name__}, but there are {world_size} ranks: their gradients would "
            "never meet. Wrap it in torch.nn.parallel.DistributedDataParallel, or pass strategy=SingleStrategy(model) "
            "if each rank is meant to train its own."
        )
    return SingleStrategy(model)


def needs_equal_forwards(config: StrategyConfig) -> bool:
    """True if the forwards of the strategy hold collectives, in evaluations too."""
    return isinstance(config, FSDPConfig)


def shards_optimizer(config: StrategyConfig) -> bool:
    """True if each rank is to keep a part of the optimizer's state (ZeRO stage 1)."""
    return isinstance(config, DDPConfig) and config.shard_optimizer


def needs_equal_micro_steps(config: StrategyConfig) -> bool:
    """True if micro-steps before the last one hold collectives, so that all ranks must take equally many."""
    if isinstance(config, DDPConfig):
        return config.static_graph or config.sync_batchnorm
    return needs_equal_forwards(config)
