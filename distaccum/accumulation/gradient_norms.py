"""Norms of a window's gradient: of all parameters together, and of each group of the optimizer's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distaccum.strategies import Strategy


def gradient_norms(optimizer: torch.optim.Optimizer, strategy: Strategy) -> Tensor:
    """Returns the norms of the gradients as they are: of each group, if there are several, and last that of all.

    All ranks call it, and get the same: a vector on the device, for which the host does not wait.
    """
    groups = [
        [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        for group in optimizer.param_groups
    ]
    if len(groups) == 1:
        return strategy.total_norm(groups[0])[None]
    norms = strategy.group_norms(groups)
    return torch.cat([norms, torch.linalg.vector_norm(norms)[None]])


def by_group(optimizer: torch.optim.Optimizer, values: Iterable[float]) -> dict[str, float]:
    """Returns values of an optimizer's groups by the `name` of each, or else its number; none if there is one group."""
    groups = optimizer.param_groups
    names = [str(group.get("name", number)) for number, group in enumerate(groups)] if len(groups) > 1 else []
    return dict(zip(names, values, strict=len(groups) > 1))
