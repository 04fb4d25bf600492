"""Language modelling: the next token at each place."""

from __future__ import annotations

from typing import Any

from torch import nn

from distaccum.accumulation.result import TaskOutput
from distaccum.errors import UserError
from distaccum.tasks.base import Task
from distaccum.tasks.cross_entropy import inputs_and_targets, summed_cross_entropy


class LanguageModeling(Task):
    """Cross-entropy over the next token. Weight: valid targets. Metric: `accuracy`.

    A micro-batch is `(inputs, targets)`, both integers `[B, T]`, the targets already one token ahead; the model's
    logits are `[B, T, V]`.

    Args:
        ignore_index: the target of padding, which counts neither in the loss nor in the weight.

    Raises:
        UserError: from a call, a micro-batch or logits of another form.
    """

    class_dim = -1

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, targets = inputs_and_targets(batch, "LanguageModeling")
        logits = model(inputs)
        if targets.dim() != 2 or logits.shape[:-1] != targets.shape:
            raise UserError(
                f"LanguageModeling needs logits [samples, length, tokens] and targets [samples, length], and got "
                f"logits {list(logits.shape)} and targets {list(targets.shape)}."
            )
        loss_sum = summed_cross_entropy(
            logits.flatten(0, 1), targets.flatten(), "LanguageModeling", ignore_index=self.ignore_index
        )
        valid = targets != self.ignore_index
        correct = (valid & (logits.detach().argmax(dim=-1) == targets)).sum()
        # The number of valid targets stays on the device: reading it here would make the host wait.
        return TaskOutput(loss_sum=loss_sum, weight=valid.sum(), sums={"accuracy": correct})
