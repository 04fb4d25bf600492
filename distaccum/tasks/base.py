"""What a task is: a loss as a sum, what it would be averaged over, and metrics as sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(slots=True)
class TaskOutput:
    """One micro-batch's part of the window.

    Attributes:
        loss_sum: sum of the per-element losses, a scalar with a gradient. Never a mean: a mean of means is wrong as
            soon as micro-batches or ranks have unequal numbers of elements.
        weight: number of elements summed (samples, valid tokens, pixels): a number, or a scalar tensor on the device.
        sums: sums that metrics are made of, by name; detached tensors of any shape, on the device. The same names and
            shapes in each micro-batch.
    """

    loss_sum: Tensor
    weight: Tensor | float
    sums: dict[str, Tensor] = field(default_factory=dict)


class Task(ABC):
    """A loss and its metrics. Subclass it, or write any callable that returns a `TaskOutput`."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        """Runs the model on one micro-batch. Must not make the host wait for the device (`.item()`, `print`)."""

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        """Makes metrics of sums over all micro-batches and ranks. By default each sum is divided by the weight.

        Args:
            sums: the added-up `TaskOutput.sums`, float64 on the CPU.
            weight: the added-up `TaskOutput.weight`.
        """
        return {name: float(value) / weight for name, value in sums.items()}
