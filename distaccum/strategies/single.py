"""One process, one device: nothing to synchronise."""

from __future__ import annotations

import torch
from torch import nn

from distaccum.strategies.base import Strategy, Traffic


class SingleStrategy(Strategy):
    """A model on one device, or on devices of its own choice, in one process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.module = model
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.traffic = Traffic()

    @property
    def can_recover(self) -> bool:
        return True
