"""The optimizer Lion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distaccum.strategies import local_parts
from distaccum.training.buckets import evaluated, in_buckets


class Lion(torch.optim.Optimizer):
    """Steps by signs (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2).

    With the gradient g, the momentum m and the parameter θ: c = β₁ m + (1 − β₁) g, then θ ← θ − lr (sign(c) + λ θ) and
    m ← β₂ m + (1 − β₂) g. Number by number, so parameters may be sharded.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: β₁ and β₂.
        weight_decay: λ.

    Raises:
        ValueError: a parameter is complex, or a number is out of its range.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr={lr} and weight_decay={weight_decay} must be at least 0, and betas={betas} at least 0 and below 1"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        if any(parameter.is_complex() for group in self.param_groups for parameter in group["params"]):
            raise ValueError("complex numbers have no sign")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes a step; returns what the closure returns, if there is one."""
        loss = evaluated(closure)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            for bucket in in_buckets(parameters):
                self._step(bucket, group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        weights = local_parts(parameters)
        gradients = local_parts([parameter.grad for parameter in parameters if parameter.grad is not None])
        momenta = local_parts([self.state[parameter]["exp_avg"] for parameter in parameters])
        (beta1, beta2), lr = group["betas"], group["lr"]
        direction = torch._foreach_mul(momenta, beta1)
        torch._foreach_add_(direction, gradients, alpha=1 - beta1)
        torch._foreach_sign_(direction)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, direction, alpha=-lr)
        torch._foreach_mul_(momenta, beta2)
        torch._foreach_add_(momenta, gradients, alpha=1 - beta2)
