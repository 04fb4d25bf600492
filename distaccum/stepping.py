"""Gradients between windows, and the optimizer's step with their last factor in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distaccum.devices import free_cached_memory, is_out_of_memory
from distaccum.errors import UserError
from distaccum.optim import check_steps, in_parameter_format
from distaccum.strategies import local_parts


class Gradients:
    """The gradients of an optimizer's parameters, at the end of a window and between windows.

    Args:
        parameters: of the model, some of which may not be the optimizer's.
        stay: they are cleared in place, for a strategy whose buckets are their home. Else they are dropped: the first
            micro-step's gradients then take their place as they are, which saves two passes over them, and no memory is
            held until then.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], *, stay: bool) -> None:
        self._optimizer = optimizer
        self._stay = stay
        self._model_parameters = list(parameters)  # walking over the modules takes as long as clearing
        self._seen: set[int] = set()

    def trained(self) -> list[int]:
        """Positions, in the optimizer's groups one after another, of parameters that have had a gradient."""
        return [number for number, parameter in enumerate(self._of_optimizer()) if id(parameter) in self._seen]

    def set_trained(self, positions: Iterable[int]) -> None:
        """Puts back what `trained` gave, perhaps in another process."""
        parameters = list(self._of_optimizer())
        self._seen = {id(parameters[number]) for number in positions if number < len(parameters)}

    def _of_optimizer(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _parameters(self) -> Iterator[Tensor]:
        yield from self._model_parameters
        yield from self._of_optimizer()

    def of_window(self) -> list[Tensor]:
        """Of the optimizer's parameters that have one, or had one in a window before.

        The latter are zero, as they are in DDP's buckets: momentum and weight decay go on under every strategy.
        """
        gradients = []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    was_trained = id(parameter) in self._seen or self._optimizer.state.get(parameter)
                    if not was_trained or not parameter.requires_grad:
                        continue
                    # Not always the parameter's own format: see `in_parameter_format`.
                    dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
                    parameter.grad = torch.zeros_like(parameter, dtype=dtype)
                self._seen.add(id(parameter))
                gradients.append(parameter.grad)
        return gradients

    def clear(self) -> None:
        """Before the first window, and after each."""
        if not self._stay:
            for parameter in self._parameters():
                parameter.grad = None
            return
        gradients = list({id(p): p.grad for p in self._parameters() if p.grad is not None}.values())
        if gradients:
            torch._foreach_zero_(local_parts(gradients))


class ScaledStep:
    """Steps an optimizer with gradients that are still to be multiplied by a factor.

    torch's fused kernels take a divisor of the gradients along, which saves a pass over all of them. It is a float32
    number, so gradients in other formats are multiplied beforehand, as are those of other optimizers, and all of them
    where somebody looks at the gradients before the step.

    Args:
        tries_again: free memory and step once more, if it runs out while the optimizer makes its state.

    Raises:
        UserError: the optimizer can't step so (see `check_steps`).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, tries_again: bool = False) -> None:
        check_steps(optimizer)
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
    inner = getattr(optimizer, "optim", optimizer)  # ZeRO-1: that of the rank's own shard
    makes_state = len(inner.state) < sum(len(group["params"]) for group in inner.param_groups)
    parameters: list[Tensor] = []
    known: list[Tensor] = []
    before = set(inner.state) if makes_state else set()
    if makes_state:
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        known = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    # bitsandbytes moves parameters without telling autograd, so that nobody can see whether it has.
    shows_changes = type(inner).__module__.partition(".")[0] != "bitsandbytes"
    versions = [tensor._version for tensor in [*parameters, *known]]
    said = ""
    for is_second in (False, True):
        try:
            step()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        may_try_again = makes_state and shows_changes and not is_second
        if not may_try_again or versions != [tensor._version for tensor in [*parameters, *known]]:
            break
        for parameter in set(inner.state) - before:
            del inner.state[parameter]
        free_cached_memory(device)
    raise UserError(
        f"out of memory in the optimizer's step: {said}. It makes its state in the first one. Take an optimizer with "
        "less state, strategy.shard_optimizer=true or strategy=fsdp on several ranks, or a smaller model."
    )
