"""A model, a task and transforms by which a run's metrics say which samples it has loaded, for runs that are killed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from killing import passing
from torch import Tensor, nn

from distaccum.tasks import Task, TaskOutput

ID_TOKEN = 100
"""Tokens from here on are ids."""


class Sample:
    """Makes a sample with some noise of a row's number and values; its length is that of the values."""

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        values = torch.tensor(row["values"], dtype=torch.float64)
        return {"values": values + 0.1 * torch.randn(len(values)).double(), "id": torch.tensor(row["id"])}


class Reader(nn.Module):
    """A linear layer of what is left of a sample's values, however many they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            passing("forward")
        values = values.flatten(1)
        found: Tensor = self.layer(
            torch.stack([values.sum(1), values.square().sum(1), values.new_ones(len(values))], 1)
        )
        return found


class ById(Task):
    """Squared errors, and as metric `ids` the sum of 2 to the power of each sample's id: exact for up to 52 of them."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        ids, values = ids_and_values(batch)
        errors = model(values.double()).squeeze(1) - ids / 40
        return TaskOutput(loss_sum=errors.square().sum(), weight=len(ids), sums={"ids": (2.0 ** ids.double()).sum()})

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        return {"ids": float(sums["ids"])}


def ids_and_values(batch: Any) -> tuple[Tensor, Tensor]:
    """Returns the ids of samples as their content tells them `[N]`, and numbers that depend on it `[N, …]`."""
    if isinstance(batch, Mapping) and "id" in batch:
        return batch["id"], batch["values"]
    if isinstance(batch, Mapping):  # documents, which begin with their number
        tokens = batch["input_ids"]
        return tokens.max(dim=1).values - ID_TOKEN, tokens / ID_TOKEN
    inputs, targets = batch
    if inputs.is_floating_point():  # images, whose red is their number
        return (inputs[:, 0, 0, 0] * 255).round().long(), inputs
    return inputs[:, 0] // inputs.shape[1], torch.stack([inputs, targets], 1) / ID_TOKEN
