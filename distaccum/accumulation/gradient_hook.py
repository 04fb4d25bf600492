"""Shows a window's mean gradients to a function of the user's, between the sync and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from distaccum.errors import NonfiniteError
from distaccum.strategies import Strategy, local_parts

OnGradients = Callable[[Mapping[str, Tensor]], object]
"""Gets the mean gradients of a window by the names of their parameters (see `Accumulator.on_gradients`)."""


def show_gradients(
    hook: OnGradients, strategy: Strategy, parameters: Sequence[Tensor], factor: float, grad_norm: float
) -> float:
    """Scales the gradients to the window's mean, and calls the hook with them.

    Args:
        parameters: the optimizer's.
        factor: to the mean.
        grad_norm: norm of the mean gradient.

    Returns:
        The norm of what the hook has left: the same number, unless it has changed a gradient in place. Only then does
        the host wait for the device.

    Raises:
        NonfiniteError: the hook has left a gradient that is NaN or infinite.
    """
    names = {id(parameter): name for name, parameter in strategy.module.named_parameters()}
    named = {
        names.get(id(parameter), f"outside.{number}"): parameter.grad
        for number, parameter in enumerate(parameters)
        if parameter.grad is not None
    }
    gradients = list(named.values())
    parts = local_parts(gradients)
    torch._foreach_mul_(parts, factor)
    before = [entry._version for entry in (*gradients, *parts)]
    with torch.no_grad():
        hook(MappingProxyType(named))
    if before == [entry._version for entry in (*gradients, *parts)]:
        return grad_norm
    grad_norm = float(strategy.total_norm(gradients))
    if not math.isfinite(grad_norm):
        raise NonfiniteError(
            f"on_gradients has left gradients whose norm is {grad_norm}. The parameters have not moved. Look at "
            "what it divides by."
        )
    return grad_norm
