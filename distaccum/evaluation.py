"""Exact evaluation: every sample once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.heartbeat import Heartbeat
from distaccum.loaders import EvaluationLoader
from distaccum.tasks.base import TaskOutput


def evaluate(
    model: nn.Module,
    task: Callable[[nn.Module, Any], TaskOutput],
    batches: Iterable[Any],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    heartbeat: Heartbeat | None = None,
    between: Callable[[bool], None] = lambda is_over: None,
) -> tuple[float, float, dict[str, Tensor]]:
    """Sums loss, weight and the task's sums over this rank's batches and over all ranks of the process group.

    Each rank may have any number of batches, none included. The model is put into evaluation mode and back.

    Args:
        model: the module to call; the bare one if ranks take unequal numbers of forwards.
        batches: this rank's part, disjoint from the other ranks'. Placeholders of an `EvaluationLoader` count nothing.
        heartbeat: told of each batch.
        between: called before each batch with False, and with True before the ranks meet at the end; what it raises
            ends the evaluation.

    Returns:
        The mean loss, the total weight, and the sums (float64 on the CPU). The same on every rank.

    Raises:
        UserError: the total weight is zero.
    """
    # Each module's own mode: a layer that is frozen by eval() must come back frozen.
    doing = (heartbeat or Heartbeat(0, 1)).doing
    modes = {module: module.training for module in model.modules()}
    model.eval()
    totals: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                between(False)
                doing("forward of an evaluation", micro_step=number + 1)
                with autocast():
                    output = task(model, batch)
                if isinstance(batches, EvaluationLoader) and batches.sizes[number] == 0:
                    continue
                parts = {"loss": output.loss_sum, "weight": torch.as_tensor(output.weight), **_prefixed(output.sums)}
                for name, value in parts.items():
                    value = value.detach().to(device=device, dtype=torch.float64)
                    totals[name] = totals[name] + value if name in totals else value
    finally:
        for module, training in modes.items():
            module.training = training
    between(True)
    doing("end of an evaluation", waits=True)
    totals = _over_ranks(totals, device)
    doing("time after an evaluation")
    weight = float(totals.pop("weight", 0.0))
    if weight <= 0:
        raise UserError(f"the evaluation has a total weight of {weight:g}: there is nothing to take the mean of.")
    loss = float(totals.pop("loss")) / weight
    return loss, weight, {name.removeprefix("sum/"): value for name, value in totals.items()}


def _prefixed(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    # A task may call one of its sums "loss" or "weight" too.
    return {f"sum/{name}": value for name, value in sums.items()}


def _over_ranks(totals: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if dist.is_initialized() and dist.get_world_size() > 1:
        # A rank without a batch doesn't know the shapes of the task's sums, so those travel first.
        shapes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, {name: tuple(value.shape) for name, value in totals.items()})
        known = max(shapes, key=len)
        flat = [
            totals.get(name, torch.zeros(shape, device=device, dtype=torch.float64)).reshape(-1)
            for name, shape in known.items()
        ]
        if flat:
            vector = torch.cat(flat)
            dist.all_reduce(vector)
            split = torch.split(vector, [part.numel() for part in flat])
            totals = {name: part.reshape(shape) for (name, shape), part in zip(known.items(), split, strict=True)}
    return {name: value.cpu() for name, value in totals.items()}
