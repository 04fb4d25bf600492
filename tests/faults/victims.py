"""A model, data and a task of which everything is random that can be, for processes that are killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from killing import passing
from torch import Tensor, nn
from torch.utils.data import Dataset

CLASSES = 4
FEATURES = 8


class Points(Dataset[tuple[Tensor, int]]):
    """Points that are moved a little, anew in each epoch, by numbers from the global generator.

    Args:
        num_samples: how many.
        noise: how far they are moved.
    """

    num_classes = CLASSES

    def __init__(self, num_samples: int, noise: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(CLASSES, FEATURES, generator=generator)
        self.num_samples = num_samples
        self.noise = noise

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % CLASSES
        return self.centres[label] + self.noise * torch.randn(FEATURES), label


class Net(nn.Module):
    """Two layers with dropout between them, and a buffer that counts.

    Args:
        num_classes: number of outputs.
        dropout: dropout after the first layer.
        seconds: how long a forward of the training takes at least, as long as there is no file `hurry`.
        draws_once_more: take a number from the generator that dropout uses, so that all its later numbers are others.
        stops_in: forward that brings a SIGTERM, as long as there is no file `stopped`, which is made then; 0 for none.
    """

    def __init__(
        self,
        num_classes: int,
        dropout: float = 0.2,
        seconds: float = 0.0,
        draws_once_more: bool = False,
        stops_in: int = 0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, 32), nn.Linear(32, num_classes)])
        self.dropout = nn.Dropout(dropout)
        self.seconds = seconds
        self.draws_once_more = draws_once_more
        self.stops_in = stops_in
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.dropout(self.layers[0](inputs).relu())
        if not self.training:
            passing("forward of an evaluation")
        else:
            self.forwards += 1
            if self.draws_once_more:
                self.draws_once_more = False
                torch.rand(())
            if self.seconds and not Path("hurry").exists():
                time.sleep(self.seconds)
            if self.forwards == self.stops_in and not Path("stopped").exists():
                Path("stopped").touch()
                os.kill(os.getpid(), signal.SIGTERM)
            passing("forward")
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: passing("backward"))
        logits: Tensor = self.layers[1](hidden)
        return logits
