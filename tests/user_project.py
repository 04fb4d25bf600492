"""Somebody's own model, data, task, optimizer and observers, outside the package."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from distaccum import LossTerm, Observer, TaskOutput
from distaccum.observers import EvaluationRecord, RunEnd, RunStart, UpdateRecord


class Points(Dataset[dict[str, Tensor]]):
    """Points of a line with slope 2; a sample is a mapping."""

    def __init__(self, num_points: int, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.linspace(-1, 1, num_points)
        self.y = 2 * self.x + noise * torch.randn(num_points, generator=generator)
        self.num_features = 1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index : index + 1], "y": self.y[index]}


class BrokenAt(Points):
    """Raises at one sample."""

    def __init__(self, num_points: int, index: int) -> None:
        super().__init__(num_points)
        self.index = index

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.index:
            raise RuntimeError("broken on purpose")
        return super().__getitem__(index)


class Stream(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.zeros(8, 1))


class Line(nn.Module):
    def __init__(self, num_features: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(-1)


class Curve(Line):
    """Needs an argument that the data doesn't know."""

    def __init__(self, degree: int) -> None:
        super().__init__(degree)


class Spare(Line):
    """Has a part that is not used: on one rank, or on none."""

    def __init__(self, num_features: int, unused_on: int | None = None) -> None:
        super().__init__(num_features)
        self.spare = nn.Linear(num_features, 1)
        self.is_used = unused_on is not None and os.environ.get("RANK") != str(unused_on)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.spare(x).squeeze(-1) if self.is_used else 0.0)

    def encode(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(-1)


class SquaredDistance:
    """A task that is no subclass of `distaccum.Task`: any callable will do."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> TaskOutput:
        errors = model(batch["x"]) - batch["y"]
        return TaskOutput(errors.square().sum(), len(errors), {"absolute_error": errors.detach().abs().sum()})


class TwoLosses(SquaredDistance):
    """A further loss of the points with a positive coordinate."""

    def weights(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"main": len(batch["x"]), "positive": (batch["x"] > 0).sum()}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> TaskOutput:
        outputs = model(batch["x"])
        errors, positive = outputs - batch["y"], batch["x"][:, 0] > 0
        terms = {"positive": LossTerm(outputs[positive].square().sum(), positive.sum(), 0.5)}
        return TaskOutput(errors.square().sum(), len(errors), terms=terms)


class EncodedDistance:
    """Calls another method of the model than its forward."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> TaskOutput:
        return TaskOutput((model.encode(batch["x"]) - batch["y"]).square().sum(), len(batch["x"]))  # type: ignore[operator]


class NanAt(SquaredDistance):
    """Gives NaN in one update, on one rank. For one micro-step per update."""

    def __init__(self, update: int, rank: int = 0) -> None:
        self.calls_left = update
        self.is_here = int(os.environ.get("RANK", "0")) == rank

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> TaskOutput:
        output = super().__call__(model, batch)
        if model.training:
            self.calls_left -= 1
            if self.is_here and self.calls_left == 0:
                output.loss_sum = output.loss_sum * math.nan
        return output


class SignDescent(torch.optim.Optimizer):
    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()


class Recorder(Observer):
    """Writes down what it was told."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.told: list[Any] = []

    def on_start(self, start: RunStart) -> None:
        self.told.append(["start", start.total_updates])

    def on_update(self, record: UpdateRecord) -> None:
        self.told.append(["update", record.update])

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.told.append(["evaluation", record.update, sorted(record.metrics)])

    def on_end(self, end: RunEnd) -> None:
        self.told.append(["end", end.updates])

    def close(self) -> None:
        self.path.write_text(json.dumps(self.told))


class Outputs(Observer):
    """Calls the model after each evaluation, on every rank, and writes down what it sees."""

    def __init__(self, path: str) -> None:
        self.path = f"{path}-{os.environ.get('RANK', 0)}"
        self.told: list[Any] = []

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.told.append("evaluation")

    def on_model(self, model: nn.Module, device: torch.device, record: EvaluationRecord) -> None:
        sharded = {type(parameter).__name__ for parameter in model.parameters()}
        output = model(torch.linspace(-1, 1, 4, device=device)[None])
        state = [model.training, output.requires_grad, torch.rand(1).item()]
        self.told.append([record.update, *sharded, *state, output[0].tolist()])

    def close(self) -> None:
        Path(self.path).write_text(json.dumps(self.told))


def outputs(path: str) -> Outputs:
    return Outputs(path)


class NoObserver:
    pass


def no_module(width: int) -> int:
    return width


def halving(total_updates: int, times: int) -> Any:
    """A schedule that halves the learning rate a few times, equally often over the run."""
    return lambda update: 0.5 ** (times * (update - 1) // total_updates)


def with_one(total_updates: int, value: Any, at: int = 1) -> Any:
    """A schedule that is 1, but for any value whatever at one update."""
    return lambda update: value if update == at else 1


def counting(total_updates: int) -> Any:
    """A schedule that has a state of its own, which no checkpoint holds."""
    calls: list[int] = []
    return lambda update: calls.append(update) or 1 / len(calls)
