"""Classification: one class per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distaccum.accumulation.result import TaskOutput
from distaccum.errors import UserError
from distaccum.tasks.base import Task
from distaccum.tasks.cross_entropy import inputs_and_targets, summed_cross_entropy

_NO_INDEX = torch.iinfo(torch.int64).min
"""No target is ignored. With torch's default, one of -100 would add nothing to the loss and still count as a sample."""


class Classification(Task):
    """Cross-entropy over classes. Weight: samples. Metric: `accuracy`.

    A micro-batch is `(inputs, targets)`, the targets integers `[B]`; the model's logits are `[B, C]`.

    Args:
        label_smoothing: probability mass spread over all classes, in [0, 1).

    Raises:
        UserError: an impossible argument; and from a call, a micro-batch or logits of another form.
    """

    class_dim = 1

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing={label_smoothing} must lie in [0, 1).")
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, targets = inputs_and_targets(batch, "Classification")
        logits = model(inputs)
        if targets.dim() != 1 or logits.dim() != 2 or len(logits) != len(targets):
            raise UserError(
                f"Classification needs logits [samples, classes] and targets [samples], and got logits "
                f"{list(logits.shape)} and targets {list(targets.shape)}."
            )
        loss_sum = summed_cross_entropy(
            logits, targets, "Classification", ignore_index=_NO_INDEX, label_smoothing=self.label_smoothing
        )
        correct = (logits.detach().argmax(dim=-1) == targets).sum()
        return TaskOutput(loss_sum=loss_sum, weight=len(targets), sums={"accuracy": correct})
