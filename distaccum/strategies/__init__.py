"""Placing a model on devices."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distaccum.config import DDPConfig, StrategyConfig
from distaccum.errors import UserError
from distaccum.strategies.base import Strategy, Traffic, local_parts
from distaccum.strategies.ddp import DDPStrategy, place_ddp
from distaccum.strategies.single import SingleStrategy

__all__ = [
    "DDPStrategy",
    "SingleStrategy",
    "Strategy",
    "Traffic",
    "local_parts",
    "needs_equal_micro_steps",
    "place",
    "strategy_of",
]


def place(module: nn.Module, config: StrategyConfig, device: torch.device) -> Strategy:
    """Moves a module to this rank's device and makes it what the strategy says.

    Raises:
        UserError: the strategy can't be had here.
    """
    module = module.to(device)
    if isinstance(config, DDPConfig):
        return place_ddp(module, config, device)
    if dist.is_initialized() and (world_size := dist.get_world_size()) > 1:
        raise UserError(
            f"strategy=single is one process, and the launcher started {world_size}: each would train a model of its "
            "own. Set strategy=ddp, or start one process."
        )
    return SingleStrategy(module)


def strategy_of(model: nn.Module) -> Strategy:
    """The strategy that a model in somebody's own loop is placed by already.

    Raises:
        UserError: a bare model among several ranks, whose gradients would never meet.
    """
    if isinstance(model, DistributedDataParallel):
        return DDPStrategy(model)
    if dist.is_initialized() and (world_size := dist.get_world_size()) > 1:
        raise UserError(
            f"the model is a bare {type(model).__name__}, but there are {world_size} ranks: their gradients would "
            "never meet. Wrap it in torch.nn.parallel.DistributedDataParallel, or pass strategy=SingleStrategy(model) "
            "if each rank is meant to train its own."
        )
    return SingleStrategy(model)


def needs_equal_micro_steps(config: StrategyConfig) -> bool:
    """True if forwards or backwards before the last one hold collectives, so that ranks must take them together."""
    return isinstance(config, DDPConfig) and (config.static_graph or config.sync_batchnorm)
