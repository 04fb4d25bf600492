"""The optimizer's step, with the gradients' last factor in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distaccum.devices import free_cached_memory, is_out_of_memory
from distaccum.errors import UserError
from distaccum.optim import in_parameter_format
from distaccum.strategies import local_parts


class ScaledStep:
    """Steps an optimizer with gradients that are still to be multiplied by a factor.

    torch's fused kernels take a divisor of the gradients along, which saves a pass over all of them. It is a float32
    number, so gradients in other formats are multiplied beforehand, as are those of other optimizers, and all of them
    where somebody looks at the gradients before the step.

    Args:
        tries_again: free memory and step once more, if it runs out while the optimizer makes its state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, tries_again: bool = False) -> None:
        self._optimizer = optimizer
        self._tries_again = tries_again
        self._divisors: dict[torch.device, Tensor] = {}

    def __call__(self, gradients: list[Tensor], factor: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """Multiplies the gradients of the optimizer's parameters by a factor, and steps.

        Args:
            scaler: has unscaled the gradients, and steps in the optimizer's place.
        """
        if scaler is not None or not self._takes_divisor(gradients):
            torch._foreach_mul_(local_parts(gradients), factor)
            with in_parameter_format(self._optimizer):
                self._take(self._optimizer.step if scaler is None else partial(scaler.step, self._optimizer), gradients)
            return
        device = gradients[0].device
        if device not in self._divisors:
            self._divisors[device] = torch.zeros((), device=device)
        optimizer: Any = self._optimizer
        optimizer.grad_scale = self._divisors[device].fill_(1.0 / factor)  # a kernel's argument: nobody waits
        try:
            self._take(optimizer.step, gradients)
        finally:
            del optimizer.grad_scale

    def _take(self, step: Callable[[], Any], gradients: list[Tensor]) -> None:
        if self._tries_again:
            step_with_room(self._optimizer, step, gradients[0].device)
        else:
            step()

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


def step_with_room(optimizer: torch.optim.Optimizer, step: Callable[[], Any], device: torch.device) -> None:
    """Takes an optimizer's step; once more if memory runs out while it makes its state, before any parameter moves.

    Raises:
        UserError: memory has run out all the same, or when it was too late to try again.
    """
    before = set(optimizer.state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    makes_state = any(parameter not in before for parameter in parameters)
    known = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    versions = [tensor._version for tensor in [*parameters, *known]] if makes_state else []
    said = ""
    for is_second in (False, True):
        try:
            step()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if is_second or versions != [tensor._version for tensor in [*parameters, *known]]:
            break
        for parameter in set(optimizer.state) - before:
            del optimizer.state[parameter]
        free_cached_memory(device)
    raise UserError(
        f"out of memory in the optimizer's step: {said}. It makes its state in the first one. Take an optimizer with "
        "less state, strategy.shard_optimizer=true or strategy=fsdp on several ranks, or a smaller model."
    )
