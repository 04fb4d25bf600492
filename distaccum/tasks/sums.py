"""Losses that are functions of sums over the window, as Dice is: exact for any cut, in one more forward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distaccum.accumulation.result import TaskOutput
from distaccum.tasks.base import CoupledTask


class SumsTask(CoupledTask):
    """A task whose loss is a function of sums over all samples of the window: a ratio of them, a correlation, an F1.

    The first forward of each micro-batch gives the samples' parts of the sums, without a graph. They are added up over
    the window, and the loss has one gradient with respect to each sum; the second forward back-propagates
    Σ gradient · part. This is gradient caching with a few numbers for each sample as embeddings. Weight: samples.

    In evaluations the sums are those of all samples, unless `evaluation_samples` is set.
    """

    @abstractmethod
    def sums(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Returns each sample's parts of the sums of one micro-batch, by name: `[samples, …]` each.

        Dimensions but the first are summed over here (pixels), or kept (classes). It is called twice for each
        micro-batch, and must give the same both times. What only metrics need may be among them, as integers or
        detached.
        """

    @abstractmethod
    def loss(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss of a window, a scalar, given the sums over its samples, by name: `[…]` each.

        It must be the same function on every rank: no random numbers, and no parameters (those belong into the model).
        """

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        """Makes metrics of the sums over all samples, which are float64 on the CPU. By default there are none.

        Args:
            sums: those of `sums`, by name: `[…]` each.
            weight: number of samples.
        """
        return {}

    def embed(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return dict(self.sums(model, batch))

    def window_loss(self, embeddings: dict[str, Tensor]) -> TaskOutput:
        samples = len(next(iter(embeddings.values())))
        sums = {name: rows.sum(dim=0) for name, rows in embeddings.items()}
        # `sums` are added up over the parts of an evaluation, and a loss is divided by the weight.
        return TaskOutput(
            loss_sum=self.loss(sums) * samples,
            weight=samples,
            sums={name: value.detach() for name, value in sums.items()},
        )
