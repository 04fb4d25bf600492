"""Losses of zero, back-propagated where other ranks wait for this one's gradients in a collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _UniformGradients(torch.autograd.Function):
    """A zero whose gradient for each parameter has one value everywhere, and takes no memory of the parameters' size.

    With None, the parameters' hooks run, and they get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, value: float | None, *parameters: Tensor) -> Tensor:
        ctx.value = value
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.value is None:
            return (None,) * (1 + len(ctx.saved_tensors))
        return None, *(parameter.new_full((), ctx.value).expand_as(parameter) for parameter in ctx.saved_tensors)


def zero_with_gradients(leaves: Sequence[Tensor], value: float | None = 0.0) -> Tensor:
    """A loss of zero whose gradient for each of the leaves is the value everywhere, or None."""
    zero: Tensor = _UniformGradients.apply(value, *leaves)  # type: ignore[no-untyped-call]
    return zero


def with_zero_gradients(loss_sum: Tensor) -> Tensor:
    """A loss of zero that reaches the same parameters, so that the strategy's hooks run and the collectives take place.

    Multiplying by zero would not do: 0 · NaN is NaN. So the model's own graph is left out of the backward.
    """
    return zero_with_gradients(leaves_behind(loss_sum))


def leaves_behind(loss_sum: Tensor) -> list[Tensor]:
    """The parameters, and whatever else takes a gradient, that a loss was computed from."""
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    nodes = [loss_sum.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return leaves
