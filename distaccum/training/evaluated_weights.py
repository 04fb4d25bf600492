"""The weights to evaluate, average and export, where an optimizer trains with others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distaccum.errors import UserError
from distaccum.strategies import Strategy, local_parts
from distaccum.strategies.optimizers import has_two_modes


@contextmanager
def evaluated_weights(strategy: Strategy, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts the weights to evaluate into the model for a while; afterwards those it trains with are back, bit for bit.

    Schedule-free optimizers (Defazio et al. 2024) take gradients at y = (1 − β) z + β x, where x is the average of z,
    and evaluate x. Their train() computes y anew from x, which rounds, so a copy of y is kept meanwhile. With any
    other optimizer nothing is done.
    """
    if not has_two_modes(optimizer):
        yield
        return
    modal: Any = optimizer
    strategy.at_rest()
    kept = [part.clone() for part in _parts(optimizer)]
    modal.eval()
    try:
        yield
    finally:
        strategy.at_rest()
        modal.train()
        torch._foreach_copy_(_parts(optimizer), kept)


def _parts(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    # Looked up anew each time, as FSDP may move a shard at its first forward.
    return local_parts([parameter.detach() for group in optimizer.param_groups for parameter in group["params"]])


def check_statistics(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuses BatchNorm with an optimizer that evaluates other weights than it trains with.

    Raises:
        UserError: there is such a layer.
    """
    if not has_two_modes(optimizer):
        return
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and part.track_running_stats:
            raise UserError(
                f"{type(optimizer).__name__} evaluates other weights than it trains with, and the running statistics "
                f"of {name or 'the model'} ({type(part).__name__}) would be those of the latter. Take GroupNorm or "
                "LayerNorm, or another optimizer."
            )
