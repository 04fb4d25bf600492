"""The two halves of a GAN as tasks of one model each, the other one frozen: what `check` can examine."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from distaccum import TaskOutput


def layers(inputs: int, outputs: int) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(inputs, 16), nn.LeakyReLU(0.2), nn.Linear(16, outputs))


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A sample and its latents, drawn by torch's global generator."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((6,), index / 40), torch.randn(4)


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(6, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(4, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class JudgeLoss:
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        real, latents = batch
        with torch.no_grad():
            fake = layers(4, 6).to(latents)(latents)
        logits = model(torch.cat([real, fake]))
        is_fake = torch.arange(len(logits)) >= len(real)
        loss_sum = F.softplus(torch.where(is_fake, logits[:, 0], -logits[:, 0])).sum()
        return TaskOutput(loss_sum, len(logits))


class GeneratorLoss:
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        _, latents = batch
        judge = layers(6, 1).to(latents).requires_grad_(False)
        logits = judge(model(latents))
        return TaskOutput(F.softplus(-logits).sum(), len(logits))
