"""The optimizer's step, with the gradients' last factor in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distaccum.optim import in_parameter_format
from distaccum.strategies import local_parts


class ScaledStep:
    """Steps an optimizer with gradients that are still to be multiplied by a factor.

    torch's fused kernels take a divisor of the gradients along, which saves a pass over all of them. It is a float32
    number, so gradients in other formats are multiplied beforehand, as are those of other optimizers, and all of them
    where somebody looks at the gradients before the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._divisors: dict[torch.device, Tensor] = {}

    def __call__(self, gradients: list[Tensor], factor: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """Multiplies the gradients of the optimizer's parameters by a factor, and steps.

        Args:
            scaler: has unscaled the gradients, and steps in the optimizer's place.
        """
        if scaler is not None or not self._takes_divisor(gradients):
            torch._foreach_mul_(local_parts(gradients), factor)
            with in_parameter_format(self._optimizer):
                if scaler is None:
                    self._optimizer.step()
                else:
                    scaler.step(self._optimizer)
            return
        device = gradients[0].device
        if device not in self._divisors:
            self._divisors[device] = torch.zeros((), device=device)
        optimizer: Any = self._optimizer
        optimizer.grad_scale = self._divisors[device].fill_(1.0 / factor)  # a kernel's argument: nobody waits
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale

    def _takes_divisor(self, gradients: list[Tensor]) -> bool:
        optimizer = self._optimizer
        return (
            type(optimizer).__module__.startswith("torch.optim.")
            and all(group.get("fused") for group in optimizer.param_groups)
            and getattr(optimizer, "_step_supports_amp_scaling", False)
            and not optimizer._optimizer_step_pre_hooks
            and all(entry.dtype is torch.float32 for group in optimizer.param_groups for entry in group["params"])
            and all(type(gradient) is Tensor and gradient.dtype is torch.float32 for gradient in gradients)
            and len({gradient.device for gradient in gradients}) == 1
        )
