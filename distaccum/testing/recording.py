"""Makes an update of a step that is to be proved, in float64, and records what the optimizer got and left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from distaccum.errors import UserError


@dataclass(slots=True)
class Update:
    """One update. Tensors are float64 on the CPU, whole where they are sharded.

    Attributes:
        gradients: as the optimizer got them at its last step.
        raw: as the last backward left them, before clipping or scaling; empty if the model is sharded.
        after: parameters and buffers.
        steps: how often the optimizer stepped.
        statistics: names of BatchNorm layers that have taken statistics of the micro-batch.
        scale: what gradients were multiplied by in each backward.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    statistics: list[str] = field(default_factory=list)
    scale: float = 1.0


@contextlib.contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prepare(model: nn.Module) -> None:
    """Converts a model to float64, and switches dropout off."""
    if any(tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in model.parameters()):
        if hasattr(model, "module") or any(hasattr(tensor, "full_tensor") for tensor in model.parameters()):
            raise NotProvableError(
                "the wrapped model has parameters that are not float64: call .double() before it is wrapped."
            )
        model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0


class NotProvableError(UserError, ValueError):
    """A step, its model or its samples don't allow a proof: the message says why, and what to do."""


def require_built(built: Any) -> None:
    """Refuses what is no model with its optimizer, around which Accelerate or Fabric may have put their own."""
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module)):
        raise NotProvableError(f"build must return the model and its optimizer, and has returned {built!r:.200}.")
    optimizer = built[1]
    if not isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.Optimizer):
        raise NotProvableError(
            f"build must return a torch.optim.Optimizer, and has returned a {type(optimizer).__name__}."
        )


@contextlib.contextmanager
def recorded(model: nn.Module, update: Update) -> Iterator[None]:
    """Records an update's gradients where the last backward and the step of any optimizer of the model leave them.

    Each backward's are multiplied by `update.scale`, unless the model is sharded: those have no hooks. The optimizer
    need not be known: trainers make it, or another one around it, late.
    """
    inside: list[object] = []  # optimizers whose step runs: ZeRO's calls that of its shard

    def keep_gradients() -> None:
        update.gradients = {
            name: copied(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    def is_ours(optimizer: torch.optim.Optimizer) -> bool:
        ours = {id(parameter) for parameter in model.parameters()}
        return any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])

    def before_step(optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not inside and is_ours(optimizer):
            update.steps += 1
            keep_gradients()
        inside.append(optimizer)

    def after_step(optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        inside.pop()
        # The backwards may be in a closure, as Lightning's.
        if not inside and is_ours(optimizer) and any(map(callable, [*arguments[1:], *options.values()])):
            keep_gradients()

    def on_accumulated(name: str) -> Callable[[Tensor], None]:
        def keep(parameter: Tensor) -> None:
            if parameter.grad is not None and not hasattr(parameter.grad, "full_tensor"):
                update.raw[name] = copied(parameter.grad)

        return keep

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if update.scale != 1.0:
                parameter.register_hook(lambda gradient: gradient * update.scale)  # type: ignore[no-untyped-call]
            parameter.register_post_accumulate_grad_hook(on_accumulated(name))  # type: ignore[no-untyped-call]
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            update.statistics.append(name)
    hooks = [register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_float64(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def copied(tensor: Any) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    found: Tensor = whole.detach().to("cpu", torch.float64, copy=True)
    return found


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
