"""The gradients of an optimizer's parameters between windows, and the step that scales them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from distaccum.errors import UserError, require
from distaccum.runtime.memory import is_out_of_memory
from distaccum.strategies import Strategy, local_parts
from distaccum.strategies.optimizers import check_steps, complete_momenta, in_parameter_format, takes_closure

_SPARSE = (
    "sparse gradients are not supported: they have no norm, and DDP can't leave rows out. Give embeddings sparse=False."
)
_of_open_windows: WeakSet[Gradients] = WeakSet()


class Gradients:
    """Collects, clears and checks the gradients of an optimizer's parameters.

    Args:
        model: its parameters are cleared too, as some may not be the optimizer's.
        strategy: if gradients are views of its buckets (`gradients_stay`), they are cleared in place. Else they are
            dropped: the first micro-step's gradients then take their place as they are, which saves two passes over
            them, and no memory is held until then.

    Raises:
        UserError: the model makes sparse gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, strategy: Strategy) -> None:
        embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
        require(not any(part.sparse for part in embeddings), _SPARSE)
        self._optimizer = optimizer
        self.strategy = strategy
        self._model_parameters = list(model.parameters())  # walking over the modules takes as long as clearing
        self._seen: set[int] = set()
        self._seen_first: list[Tensor] = []
        self._checked: set[int] = set()

    def trained(self) -> list[int]:
        """Positions in the optimizer's groups, one after another, of parameters that have had a gradient."""
        return [number for number, parameter in enumerate(self.of_optimizer()) if id(parameter) in self._seen]

    def set_trained(self, positions: Iterable[int]) -> None:
        """Restores what `trained` returned, perhaps in another process."""
        parameters = self.of_optimizer()
        self._seen = {id(parameters[number]) for number in positions if number < len(parameters)}
        self._checked.clear()

    def of_optimizer(self) -> list[Tensor]:
        """The optimizer's parameters, in the order of its groups."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def named(self) -> dict[str, Tensor]:
        """The optimizer's parameters that are trained: by their names in the model, others by their places."""
        names = {id(parameter): name for name, parameter in self.strategy.module.named_parameters()}
        numbered = enumerate(self.of_optimizer())
        return {names.get(id(p), f".outside.{number}"): p for number, p in numbered if p.requires_grad}

    def _parameters(self) -> Iterator[Tensor]:
        yield from self._model_parameters
        yield from self.of_optimizer()

    def of_window(self, calls_before: int) -> list[Tensor]:
        """Returns the gradients of the optimizer's parameters that have one, or had one in a window before.

        The latter are zero, as they are in DDP's buckets: momentum and weight decay go on under every strategy, until
        the parameter is frozen.

        Args:
            calls_before: the number of collectives before the window, for `Strategy.require_sync`.

        Raises:
            UserError: there is none, or gradients were not synchronised.
        """
        gradients, new = [], []
        for parameter in self.of_optimizer():
            if not parameter.requires_grad:
                parameter.grad = None  # has stayed in DDP's buckets, where the optimizer would still see it
                self._checked.discard(id(parameter))  # when it is unfrozen, the sync may not know it
                continue
            if parameter.grad is None:
                if id(parameter) not in self._seen and not self._optimizer.state.get(parameter):
                    continue
                # Not always the parameter's own format: see `in_parameter_format`.
                dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
                parameter.grad = torch.zeros_like(parameter, dtype=dtype)
            if id(parameter) not in self._checked:
                require(parameter.grad.layout is torch.strided, _SPARSE)
                new.append(parameter)
            gradients.append(parameter.grad)
        require(bool(gradients), "no parameter of the optimizer got a gradient: does the loss depend on them?")
        self.strategy.require_sync(calls_before, new)
        self._checked.update(map(id, new))
        self._seen_first = [parameter for parameter in new if id(parameter) not in self._seen]
        self._seen.update(map(id, new))
        return gradients

    def take_back(self) -> None:
        """Undoes `of_window`, for a window that is taken again: parameters without a gradient before have none."""
        for parameter in self._seen_first:
            parameter.grad = None
            self._seen.discard(id(parameter))

    def begin(self) -> None:
        """Marks the beginning of a window.

        Raises:
            UserError: a window over some of the same parameters is open, whose gradients the two would share.
        """
        mine = set(map(id, self._parameters())) if _of_open_windows else set()
        for other in _of_open_windows:
            if other is not self and not mine.isdisjoint(map(id, other._parameters())):
                raise UserError(
                    "another Accumulator of some of the same parameters has a window open, and its gradients would get "
                    "lost: call its step() first, or its clear_gradients() to drop them."
                )
        _of_open_windows.add(self)

    def end(self) -> None:
        """Marks the end of a window, however it ended."""
        _of_open_windows.discard(self)
        self.clear()

    def clear(self) -> None:
        """Drops all gradients, or sets them to zero."""
        if not self.strategy.gradients_stay:
            for parameter in self._parameters():
                parameter.grad = None
            return
        gradients = list({id(p): p.grad for p in self._parameters() if p.grad is not None}.values())
        if gradients:
            torch._foreach_zero_(local_parts(gradients))


class ScaledStep:
    """Steps an optimizer with gradients that are still to be multiplied by a factor.

    torch's fused kernels divide the gradients by a number on the way, which saves a pass over all of them. It is a
    float32 number, so gradients in other formats are multiplied beforehand, as are those of other optimizers, and all
    of them if the optimizer has hooks that see the gradients before the step. For an optimizer that evaluates the loss
    itself, gradients are multiplied alone: it is in the middle of its step.

    Args:
        clip_value: the largest absolute value of a number of the multiplied gradients; None for no limit.

    Raises:
        UserError: the optimizer can't step so (see `check_steps`).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_value: float | None = None) -> None:
        check_steps(optimizer)
        self._optimizer = optimizer
        self._is_stepping = takes_closure(optimizer)
        self._clip_value = clip_value
        self._divisors: dict[torch.device, Tensor] = {}
        self._stepped = 0

    def __call__(self, gradients: list[Tensor], factor: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """Multiplies the gradients of the optimizer's parameters by a factor, and steps.

        Args:
            scaler: has unscaled the gradients, and steps in the optimizer's place.
        """
        if len(gradients) != self._stepped:  # the first time, and when another parameter gets a gradient
            self._stepped = len(gradients)
            complete_momenta(self._optimizer)
        if scaler is not None or not self._takes_divisor(gradients):
            parts = local_parts(gradients)
            torch._foreach_mul_(parts, factor)
            if self._clip_value is not None:
                torch._foreach_clamp_max_(parts, self._clip_value)
                torch._foreach_clamp_min_(parts, -self._clip_value)
            if self._is_stepping:
                return
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
            not self._is_stepping
            and self._clip_value is None
            and type(optimizer).__module__.startswith("torch.optim.")
            and all(group.get("fused") for group in optimizer.param_groups)
            and getattr(optimizer, "_step_supports_amp_scaling", False)
            and not optimizer._optimizer_step_pre_hooks
            and all(entry.dtype is torch.float32 for group in optimizer.param_groups for entry in group["params"])
            and all(type(gradient) is Tensor and gradient.dtype is torch.float32 for gradient in gradients)
            and len({gradient.device for gradient in gradients}) == 1
        )


@dataclass(slots=True)
class Scaling:
    """Says whether a scaler adapts its scale after an update.

    Attributes:
        stays: it stays what it is, as the scaler has not seen this window, which is taken again.
    """

    stays: bool = False


@contextmanager
def unscaled(scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer) -> Iterator[Scaling]:
    """Unscales the gradients of an optimizer's parameters for its step, and adapts the scale afterwards."""
    scaling = Scaling()
    if scaler is None:
        yield scaling
        return
    scaler.unscale_(optimizer)
    try:
        yield scaling
    finally:
        scaler.update(scaler.get_scale() if scaling.stays else None)


def said_of_memory(error: Exception) -> str | None:
    """Returns the message of an error in one line, if it says that memory has run out; else None."""
    if not is_out_of_memory(error):
        return None
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
