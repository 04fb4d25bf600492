"""One process, one device: nothing to synchronise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distaccum.strategies.base import Strategy, Traffic


class SingleStrategy(Strategy):
    """A model on one device, or on devices of its own choice, in one process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.module = model
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.traffic = Traffic()

    def begin_window(self) -> None:
        pass

    def last_gradient(self, parameters: Sequence[Tensor]) -> Tensor | None:
        return None

    def begin_sync(self, loss_sum: Tensor) -> None:
        pass

    def complete_sync(self) -> None:
        pass
