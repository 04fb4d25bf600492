"""Adds up the scalars of micro-steps on the device, without making the host wait for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stacks scalars on the device; in float64 where formats differ, as float32 would round large whole numbers."""
    if any(value.device != device or value.dtype != values[0].dtype for value in values):
        values = [value.to(device, torch.float64, non_blocking=True) for value in values]
    return torch.stack(list(values))


def added_up(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the sum of tensors of one shape, as a vector of float64 on the device."""
    return stacked(values, device).sum(0, dtype=torch.float64).reshape(-1)


def added_weights(weights: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Returns the sum of numbers and scalar tensors, float64 `[1]` on the device: NaN if one is negative."""
    tensors = [value for value in weights if isinstance(value, Tensor)]
    if len(tensors) < len(weights) or not tensors:
        numbers = math.fsum(value for value in weights if not isinstance(value, Tensor))
        # full, as copying a number to a GPU would make the host wait.
        tensors.append(torch.full((), numbers, dtype=torch.float64, device=device))
    values = stacked(tensors, device).double()
    # A negative weight would be hidden by the others in the sum; NaN is not.
    return values.masked_fill_(values < 0, math.nan).sum(0, keepdim=True)
