"""Tasks: a loss as a sum, the weight that it is averaged over, and metrics as sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distaccum.accumulation.result import TaskOutput, as_number
from distaccum.accumulation.terms import Weights


class Task(ABC):
    """A loss and its metrics. Subclass it, or write any callable that returns a `TaskOutput`.

    Attributes:
        class_dim: dimension of the model's output that classes lie along, where that is logits; None where it isn't.
    """

    class_dim: int | None = None

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        """Runs the model on one micro-batch. Must not make the host wait for the device (`.item()`, `print`)."""

    def weights(self, batch: Any) -> Mapping[str, Tensor | float]:
        """Counts the elements of each loss in a micro-batch. To be overridden by a task whose outputs have `terms`.

        It is called on the host with each micro-batch of a window, before the window's first forward. What it counts
        must be what the outputs give as weights.

        Returns:
            Numbers or scalar tensors by name, the same names each time: `main`, and those of the terms.
        """
        raise NotImplementedError(f"{type(self).__name__} has one loss, so nothing is counted beforehand")

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        """Makes metrics of sums over all micro-batches and ranks. By default each sum is divided by the weight.

        Args:
            sums: the added-up `TaskOutput.sums`, float64 on the CPU.
            weight: the added-up `TaskOutput.weight`.
        """
        return {name: as_number(value, f"the task's metric {name}") / weight for name, value in sums.items()}

    def sample(self, model: nn.Module, data: Any) -> str | None:
        """Returns a text that shows what the model does, for the log after an evaluation; None for none.

        All ranks call it at the same time, and must run equally many forwards: those that shard the model wait for each
        other. Gradients are off, and the model is in evaluation mode.

        Args:
            model: the bare module.
            data: the evaluation data.
        """
        return None


def weights_of(task: Any) -> Weights | None:
    """Returns what counts the elements of a task's losses; None if it has one loss alone."""
    found: Weights | None = getattr(task, "weights", None)
    return None if getattr(found, "__func__", None) is Task.weights else found


class CoupledTask(Task):
    """A task whose loss couples all samples of a window, as contrastive losses do: it is no sum over micro-batches.

    The trainer embeds every micro-batch, takes the loss of the whole window, and back-propagates with cached gradients
    (see `distaccum.accumulation.gradient_caching`): the update is that of the window in one shot, for any cut. `embed`
    is called twice for each micro-batch.

    Attributes:
        evaluation_samples: how many samples are put together for a loss in evaluations, in the dataset's order; None
            for all of them. Such a loss depends on it, so it should be near the window's size.
    """

    evaluation_samples: int | None = None

    @abstractmethod
    def embed(self, model: nn.Module, batch: Any) -> Any:
        """Returns the embeddings of one micro-batch.

        Returns:
            A tensor with one row for each sample, or a tuple, list or dictionary of such tensors, among which may be
            what else the loss needs, as labels.
        """

    @abstractmethod
    def window_loss(self, embeddings: Any) -> TaskOutput:
        """Returns the loss of a whole window, given the rows of all its micro-batches and ranks, in float32 at least.

        It must be the same function on every rank: no random numbers, and no parameters (those belong into the model).
        """

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        """Takes the batch as a window of its own."""
        return self.window_loss(self.embed(model, batch))
