"""A model that runs out of memory when a test wants it to."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.tasks import TaskOutput

POINTS = ("begin", "middle", "end")


class Faults:
    """Where memory runs out: each point is passed once a micro-step, in the forward and in the backward.

    Attributes:
        strikes: asked at each point; True raises.
        seen: all points passed, for tests to know that they have covered them.
    """

    def __init__(self) -> None:
        self.strikes: Callable[[str, str, int], bool] = lambda direction, point, samples: False
        self.raised = 0

    def pass_by(self, direction: str, point: str, samples: int) -> None:
        if self.strikes(direction, point, samples):
            self.raised += 1
            raise torch.OutOfMemoryError(f"injected in the {direction} at {point}, {samples} samples")

    def nth(self, number: int, direction: str, point: str) -> None:
        """Strikes once, when a point is passed for the nth time from here on (from 1)."""
        passed = 0

        def strikes(this_direction: str, this_point: str, _: int) -> bool:
            nonlocal passed
            passed += (this_direction, this_point) == (direction, point)
            is_due = passed == number
            passed += is_due  # never again
            return is_due

        self.strikes = strikes

    def above(self, samples: int, direction: str, point: str) -> None:
        """Strikes whenever a micro-batch has more samples."""
        self.strikes = lambda *passed: passed[:2] == (direction, point) and passed[2] > samples


class _Point(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, faults: Faults, point: str) -> Tensor:
        ctx.faults, ctx.point, ctx.samples = faults, point, len(inputs)
        if torch.is_grad_enabled() or inputs.requires_grad:
            faults.pass_by("forward", point, len(inputs))
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.faults.pass_by("backward", ctx.point, ctx.samples)
        return gradient, None, None


class Fragile(nn.Module):
    """Classifies vectors; counts its forwards in a buffer that the output depends on, if `counts`.

    The points: before the first layer (whose backward comes after all gradients), between the layers, after the last.
    """

    def __init__(self, width: int = 6, classes: int = 3, *, counts: bool = False) -> None:
        super().__init__()
        self.faults = Faults()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.out = nn.Linear(width, classes)
        if counts:
            self.register_buffer("forwards", torch.zeros((), dtype=torch.float64))
            self.register_buffer("gain", torch.ones((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.requires_grad_() if torch.is_grad_enabled() else inputs
        hidden = _Point.apply(hidden, self.faults, "begin")
        for number, layer in enumerate(self.layers):
            hidden = torch.tanh(layer(hidden))
            if number == 1:
                hidden = _Point.apply(hidden, self.faults, "middle")
        if hasattr(self, "gain"):
            with torch.no_grad():
                self.forwards.add_(1)
            hidden = hidden * self.gain
        return _Point.apply(self.out(hidden), self.faults, "end")


class Vectors(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Labelled vectors in float64, with noise that is drawn when a sample is loaded."""

    def __init__(self, num_samples: int = 44, width: int = 6, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(num_samples, width, generator=generator, dtype=torch.float64)
        self.targets = torch.randint(0, 3, (num_samples,), generator=generator)
        self.lengths = [1 + index % 5 for index in range(num_samples)]
        self.noise = noise
        self.num_classes = 3

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(self.inputs.shape[1], dtype=torch.float64)
        return self.inputs[index] + self.noise * noise, self.targets[index]


def task(model: nn.Module, batch: tuple[Tensor, Tensor]) -> TaskOutput:
    """Classification whose loss, too, is a point ("loss") where memory may run out."""
    inputs, targets = batch
    scores = model(inputs)
    bare = getattr(model, "module", model)
    if torch.is_grad_enabled():
        bare.faults.pass_by("forward", "loss", len(inputs))
    loss_sum = nn.functional.cross_entropy(scores, targets, reduction="sum")
    correct = (scores.argmax(1) == targets).sum()
    return TaskOutput(loss_sum, len(targets), {"correct": correct})


class FragileRun(Fragile):
    """`Fragile`, for whole runs: memory runs out by a rule that a command line can give.

    Args:
        fits: samples that a micro-batch may have; with `from_forward`, from the nth training forward of the process on.
        rank: the only rank where it does; None for all.
        direction, point: where in the micro-step.
    """

    def __init__(
        self,
        fits: int,
        from_forward: int = 0,
        rank: int | None = None,
        direction: str = "forward",
        point: str = "end",
        num_classes: int = 3,
    ) -> None:
        super().__init__(classes=num_classes)
        self.training_forwards = 0
        if rank in (None, int(os.environ.get("RANK", "0"))):
            self.faults.strikes = lambda *passed: (
                passed[:2] == (direction, point) and passed[2] > fits and self.training_forwards >= from_forward
            )

    def forward(self, inputs: Tensor) -> Tensor:
        self.training_forwards += torch.is_grad_enabled()
        return super().forward(inputs)
