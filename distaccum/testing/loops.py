"""Steps as the guides of Accelerate and Fabric have them, for a loss of one's own: `Loop(step=accelerate(loss), …)`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.testing.recording import NotProvableError
from distaccum.testing.same_update import Step
from distaccum.testing.trainers import forget_accelerate, ranks

Loss = Callable[[nn.Module, Any], Tensor]
"""Computes the loss of a micro-batch from the model, wrapped as the framework wraps it, and the micro-batch."""


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise NotProvableError(f"this loop needs {package} ({error}). Install it: pip install {package}") from error


def _accelerator(steps: int) -> Any:
    package = _imported("accelerate")
    forget_accelerate()
    return package.Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=steps)


def accelerate(mean_loss: Loss) -> Step:
    """Returns the loop that Accelerate's guide to gradient accumulation begins with: `accelerator.accumulate`."""

    def step(model: nn.Module, optimizer: Any, micro_batches: list[Any]) -> None:
        accelerator = _accelerator(len(micro_batches))
        placed, prepared = accelerator.prepare(model, optimizer)
        for batch in micro_batches:
            with accelerator.accumulate(placed):
                accelerator.backward(mean_loss(placed, batch))
                prepared.step()

    return step


def accelerate_by_count(loss_sum: Loss, count: Callable[[Any], Tensor]) -> Step:
    """Returns the loop of the same guide's section on training samples of variable size.

    Args:
        loss_sum: the loss as a sum.
        count: returns the number of its terms in a micro-batch.
    """

    def step(model: nn.Module, optimizer: Any, micro_batches: list[Any]) -> None:
        accelerator = _accelerator(len(micro_batches))
        placed, prepared = accelerator.prepare(model, optimizer)
        total = accelerator.gather(torch.stack([count(batch) for batch in micro_batches]).sum()).sum()
        for number, batch in enumerate(micro_batches, 1):
            with nullcontext() if number == len(micro_batches) else accelerator.no_sync(placed):
                loss = loss_sum(placed, batch) * accelerator.gradient_accumulation_steps
                accelerator.backward(loss * accelerator.num_processes / total)
        prepared.step()

    return step


def fabric(mean_loss: Loss) -> Step:
    """Returns the loop of Fabric's guide to gradient accumulation: `fabric.no_backward_sync`."""

    def step(model: nn.Module, optimizer: Any, micro_batches: list[Any]) -> None:
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        strategy = "ddp" if ranks() > 1 else "auto"
        fabric = _imported("lightning.fabric").Fabric(accelerator=accelerator, devices=ranks(), strategy=strategy)
        fabric.launch()
        placed, prepared = fabric.setup(model, optimizer)
        for number, batch in enumerate(micro_batches, 1):
            with fabric.no_backward_sync(placed, enabled=number < len(micro_batches)):
                fabric.backward(mean_loss(placed, batch) / len(micro_batches))
        prepared.step()

    return step
