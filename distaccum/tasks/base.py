"""What a task is: a loss as a sum, what it would be averaged over, and metrics as sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.errors import UserError


@dataclass(slots=True)
class TaskOutput:
    """One micro-batch's part of the window.

    Attributes:
        loss_sum: sum of the per-element losses, a scalar with a gradient. Never a mean: a mean of means is wrong as
            soon as micro-batches or ranks have unequal numbers of elements.
        weight: number of elements summed (samples, valid tokens, pixels): a number, or a scalar tensor on the device.
        sums: sums that metrics are made of, by name; detached tensors of any shape, on the device, or numbers. The same
            names and shapes in each micro-batch.
    """

    loss_sum: Tensor
    weight: Tensor | float
    sums: dict[str, Tensor] = field(default_factory=dict)


def checked_output(output: Any, what: str = "the task") -> TaskOutput:
    """What a task has answered, its numbers of any kind as Python's and its sums as tensors. Looks at types alone.

    Raises:
        UserError: it is no `TaskOutput`, or holds what is neither a tensor nor a number.
    """
    if not isinstance(output, TaskOutput) or not isinstance(output.loss_sum, Tensor):
        raise UserError(
            f"{what} returned a {type(output).__name__}, not a distaccum.TaskOutput with a tensor as loss_sum. Return "
            "TaskOutput(loss_sum=…, weight=…)."
        )
    if not isinstance(output.weight, Tensor):
        output.weight = as_number(output.weight, f"{what}'s weight")
    sums: dict[str, Any] = output.sums
    output.sums = {
        name: value
        if isinstance(value, Tensor)
        else torch.tensor(as_number(value, f"{what}'s sum {name}"), dtype=torch.float64)
        for name, value in sums.items()
    }
    return output


def as_number(value: Any, what: str) -> float:
    """A number of Python's or NumPy's, or of a tensor that holds a single one.

    Raises:
        UserError: it is anything else.
    """
    try:
        number = value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError):  # several
        number = value
    if not isinstance(number, Real):
        shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
        raise UserError(f"{what} is a {type(value).__name__}{shape}, where a number is wanted.")
    return float(number)


class Task(ABC):
    """A loss and its metrics. Subclass it, or write any callable that returns a `TaskOutput`.

    Attributes:
        class_dim: dimension of the model's output that classes lie along, where that is logits; None where it isn't.
    """

    class_dim: int | None = None

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        """Runs the model on one micro-batch. Must not make the host wait for the device (`.item()`, `print`)."""

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        """Makes metrics of sums over all micro-batches and ranks. By default each sum is divided by the weight.

        Args:
            sums: the added-up `TaskOutput.sums`, float64 on the CPU.
            weight: the added-up `TaskOutput.weight`.
        """
        return {name: as_number(value, f"the task's metric {name}") / weight for name, value in sums.items()}


class CoupledTask(Task):
    """A task whose loss couples all samples of a window, as contrastive losses do: it is no sum over micro-batches.

    The trainer embeds every micro-batch, takes the loss of the whole window, and back-propagates with cached gradients
    (see `distaccum.caching`): the update is that of the window in one shot, for any cut. `embed` is called twice for
    each micro-batch.

    Attributes:
        evaluation_samples: how many samples are put together for a loss in evaluations, in the dataset's order; None
            for all of them. Such a loss depends on it, so it should be near the window's size.
    """

    evaluation_samples: int | None = None

    @abstractmethod
    def embed(self, model: nn.Module, batch: Any) -> Any:
        """Embeddings of one micro-batch.

        Returns:
            A tensor with one row for each sample, or a tuple, list or dictionary of such tensors, among which may be
            what else the loss needs, as labels.
        """

    @abstractmethod
    def window_loss(self, embeddings: Any) -> TaskOutput:
        """The loss of a whole window, given the rows of all its micro-batches and ranks, in float32 at least.

        It must be the same function on every rank: no random numbers, and no parameters (those belong into the model).
        """

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        """One shot: the batch as a window of its own."""
        return self.window_loss(self.embed(model, batch))
