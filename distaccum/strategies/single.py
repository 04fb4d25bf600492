"""One process, one device: nothing to synchronise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from distaccum.strategies.base import Traffic


class SingleStrategy:
    """A model on one device, or on devices of its own choice, in one process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.module = model
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.world_size = 1
        self.process_group = None
        self.traffic = Traffic()

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def share_buffers(self) -> None:
        pass
